"""A real ComfyUI goes on: retries on fresh workers, and hardships of the machine, each with one message."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.comfyui.graphs import Graph, Setting, Swapped, fresh, model_node, sampling_graph
from tests.comfyui.latents import read_latent, sample
from tests.comfyui.model_files import DEEP
from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer, PromptResult
from tests.distributed.faults import Faults
from tests.distributed.faulty_boot import IS_KILLED

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TWO = Swapped(devices="cpu,cpu")
RETRY = replace(TWO, on_failure="retry")
LORA = model_node("LoraLoaderModelOnly", lora_name="hunyuan_native.safetensors", strength_model=1.0)
LONG = Setting(checkpoint=DEEP, width=128, height=128, length=17, steps=6)
"""Seconds long."""


@pytest.mark.parametrize("chain", ["ksampler", "sp_sampler"])
@pytest.mark.parametrize("nodes", [(), (LORA,)], ids=["plain", "lora"])
def test_a_lost_worker_costs_a_step_and_no_bit(
    server: ComfyServer, faults: Faults, chain: str, nodes: tuple[object, ...]
) -> None:
    setting = fresh(Setting(chain=chain, steps=4, model_nodes=nodes))
    right = sample(server, setting, TWO)
    start = server.mark()
    faults.order(IS_KILLED, [1], place="before pass" if chain == "sp_sampler" else "before block", count=3)
    prompt_id = server.queue(sampling_graph(setting, RETRY))
    assert isinstance(prompt_id, str), prompt_id

    def told() -> list[str]:
        return [event.data["kind"] for event in server.events("sequence_parallel.event", since=start)]

    assert wait_until(lambda: "retried" in told(), timeout=120), server.log_tail()
    faults.clear()  # before fresh workers have begun
    result = server.wait(prompt_id)
    assert torch.equal(read_latent(server, result), right)
    assert told() == ["crashed", "retried", "started"]


@pytest.fixture
def own_checkpoint(server: ComfyServer) -> Iterator[Path]:
    """A copy of the tiny model that a test may damage."""
    folder = server.models / "diffusion_models"
    path = folder / "damaged.safetensors"
    shutil.copy(folder / Setting().checkpoint, path)
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["vanished", "cut"])
def test_a_file_that_vanishes_or_shrinks_is_named(server: ComfyServer, own_checkpoint: Path, how: str) -> None:
    """Between two prompts, when the loader's MODEL is known already."""
    setting = Setting(checkpoint=own_checkpoint.name)
    right = sample(server, fresh(setting), TWO)
    server.free(free_memory=False)
    assert right.isfinite().all()
    if how == "vanished":
        own_checkpoint.unlink()
    else:
        with own_checkpoint.open("r+b") as file:
            file.truncate(own_checkpoint.stat().st_size // 2)
    result = server.run(sampling_graph(fresh(setting), TWO))
    assert result.status in ("error", "rejected")
    assert own_checkpoint.name in result.message, result.message
    after = fresh(Setting())
    assert sample(server, after, TWO).isfinite().all()


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_thirty_cancels_and_ten_kills_at_random_moments(server: ComfyServer) -> None:
    """Each ends its prompt by itself, and the next one has the bits of an undisturbed one."""
    moments = random.Random(0)
    right = {chain: sample(server, replace(LONG, chain=chain, seed=5), TWO) for chain in ("ksampler", "sp_sampler")}
    began = time.monotonic()
    sample(server, replace(LONG, seed=6), TWO)
    lasts = time.monotonic() - began
    ended: list[str] = []
    for number in range(40):
        chain, kills = ("ksampler", "sp_sampler")[number % 2], number % 4 == 3
        graph = sampling_graph(fresh(replace(LONG, chain=chain)), TWO)
        prompt_id = server.queue(graph)
        assert isinstance(prompt_id, str)
        server.wait_for_node("SPSampler" if chain == "sp_sampler" else "KSampler", graph, prompt_id)
        time.sleep(moments.uniform(0, lasts))
        if kills:
            moments.choice(server.workers()).kill(signal.SIGKILL)
        else:
            server.interrupt()
        result = server.wait(prompt_id)
        ended.append(result.status)
        if result.status == "error":
            assert re.search(r"worker rank [01] \(cpu, pid \d+\)", result.message), result.message
        assert result.status in ("success", "error" if kills else "interrupted"), result.message
    assert ended.count("interrupted") >= 15 and ended.count("error") >= 5, ended
    for chain, latent in right.items():
        graph = sampling_graph(replace(LONG, chain=chain, seed=5), TWO)
        assert torch.equal(_latent_of(server, graph), latent)


def _latent_of(server: ComfyServer, graph: Graph) -> torch.Tensor:
    server.free()  # not from ComfyUI's cache
    result: PromptResult = server.run(graph)
    return read_latent(server, result)
