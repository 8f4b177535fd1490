"""A real ComfyUI goes on: retries on fresh workers, and hardships of the machine, each with one message."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.comfyui.fixtures import ServerFactory, require_pack
from tests.comfyui.graphs import Graph, Setting, Swapped, fresh, model_node, sampling_graph
from tests.comfyui.latents import read_latent, relative_difference, sample
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
@pytest.mark.parametrize("nodes", [(), pytest.param((LORA,), marks=pytest.mark.extended)], ids=["plain", "lora"])
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


ROOM = "256k"
"""Of the cramped machine's shared memory, output folder and logs: a few tiny latents."""
LOG_FOLDER = "__sequence_parallel"


@pytest.fixture
def cramped(start_server: ServerFactory) -> Iterator[ComfyServer]:
    """A server that sees a full /dev/shm, models it may not write to, no room for logs, and little for outputs."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of one's own here (unshare --mount)")

    def wrapper(base: Path) -> list[str]:
        small = [Path("/dev/shm"), base / "output", base / "user" / LOG_FOLDER]
        small[-1].mkdir(parents=True)
        lines = [f"mount -t tmpfs -o size={ROOM} none {shlex.quote(str(path))}" for path in small]
        lines += [f"cat /dev/zero > {shlex.quote(str(path / 'full'))} || true" for path in (small[0], small[-1])]
        for models in (base / "models").iterdir():
            folder = shlex.quote(str(models.resolve()))
            lines += [f"mount --bind {folder} {folder}", f"mount -o remount,bind,ro {folder}"]
        script = " && ".join([*(f"{{ {line}; }}" for line in lines), 'exec "$@"'])
        return ["unshare", "--mount", "sh", "-c", script, "sh"]

    with start_server(wrapper=wrapper) as server:
        yield server


def test_a_machine_without_room(cramped: ComfyServer) -> None:
    """Nothing of the pack's needs what is missing; what ComfyUI itself cannot write, ComfyUI names."""
    require_pack(cramped)
    with pytest.raises(OSError, match="No space left on device"):
        (cramped.seen(Path("/dev/shm")) / "more").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="Read-only file system"):
        (cramped.seen((cramped.models / "diffusion_models").resolve()) / "more").write_bytes(b"1")
    setting = fresh(Setting())
    assert relative_difference(sample(cramped, setting, TWO), sample(cramped, setting)) < 1e-5
    assert len(cramped.workers()) == 2
    assert len(re.findall("the workers' log cannot be written to .*No space left on device", cramped.log())) == 1

    full = cramped.output / "full"
    with suppress(OSError):
        full.write_bytes(bytes(1 << 20))
    result = cramped.run(sampling_graph(fresh(Setting()), TWO))
    assert result.status == "error" and result.node_type == "SaveLatent", result
    assert "No space left on device" in result.message
    full.unlink()
    workers = cramped.workers()
    assert sample(cramped, fresh(Setting()), TWO).isfinite().all()
    assert cramped.workers() == workers, "a full disk cost the workers"


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
