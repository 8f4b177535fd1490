"""Sampler (SP): KSampler's result, progress, previews and Cancel, after one message to the workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.comfyui.graphs import OUTPUT, GraphBuilder, Setting, Swapped, add_sampling, fresh, model_node, sampling_graph
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import DEEP
from tests.comfyui.processes import gains_cpu, total_cpu_seconds, wait_until
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

SCRIPT = Path(__file__).with_name("sampler_against_native.py")
TWO = Swapped(devices="cpu,cpu")
VISIBLE = Setting(width=256, height=384, length=33, steps=3, chain="sp_sampler")
LONG = replace(VISIBLE, checkpoint=DEEP, steps=20)
IN_WORKERS = re.compile(r"Sampler \(SP\): (\d+) steps? in the workers .* after (\d+) message")
STEPWISE = re.compile(r"Sampler \(SP\): sampled step by step, as by KSampler, in [0-9.]+ s: (.*)")
CACHED = re.compile(r"skipped the blocks in (\d+) of (\d+) network passes")


def log_of(server: ComfyServer, setting: Setting, swapped: Swapped | None = TWO) -> tuple[torch.Tensor, str]:
    """The latent, and what was logged meanwhile."""
    start = len(server.log())
    latent = sample(server, setting, swapped)
    return latent, server.log()[start:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("samplers", ["some", pytest.param("every", marks=pytest.mark.thousands)])
def test_the_latent_is_ksamplers(installation: Installation, tmp_path: Path, samplers: str) -> None:
    """On native MODELs of every family, with masks, denoise 0.6 and CFG."""
    drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    run = subprocess.run(
        [installation.python, SCRIPT, installation.path, REPOSITORY, tmp_path, samplers],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in drop},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(run.stdout.splitlines()[-1])
    previews = results.pop("previews")
    assert previews["none, 0 s"] == [0, 0, 6], "latents came back though nobody looks"
    assert previews["latent2rgb, 1000 s"] == [2, 2, 6], "the first step and the last"
    sent, shown, done = previews["latent2rgb, 0 s"]
    assert sent >= shown >= 2 and done == 6  # the last one may come before the one before has been looked at
    assert previews["another node's callback"] == [True, 0.0]
    assert {"euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm"} <= set(results)
    for case, result in results.items():
        assert result["difference"] <= (1e-4 if case.startswith("euler") else 1e-3), f"{case}: {result}"
        assert result["shown_difference"] <= 1e-3 and result["last_step_shown"], f"{case}: {result}"
        if case == "dpm_adaptive":
            assert "aten.abs" in result["told"]
        elif case == "area":
            assert "conditioning for an area" in result["told"]
        else:
            assert "in the workers" in result["told"] and result["messages"] <= 2, f"{case}: {result}"


@pytest.mark.slow
def test_progress_and_previews_arrive_at_every_step(server: ComfyServer) -> None:
    sample(server, fresh(VISIBLE), TWO)
    setting = fresh(VISIBLE, steps=4)
    start, logged = server.mark(), len(server.log())
    result = server.run(sampling_graph(setting, TWO))
    latent = read_latent(server, result)
    progress = server.events("progress", result.prompt_id)
    steps = [event for event in progress if event.data["max"] == setting.steps]
    assert [event.data["value"] for event in steps] == [1, 2, 3, 4]
    assert steps[-1].when - steps[0].when > 0.4 * result.seconds, "the steps were reported together, not one by one"
    previews = server.events("preview", since=start)
    assert len(previews) == setting.steps
    assert all(event.data["image"][:2] == b"\xff\xd8" for event in previews), "previews are not JPEG images"
    (told,) = IN_WORKERS.findall(server.log()[logged:])
    assert told == ("4", "1")
    assert relative_difference(latent, sample(server, replace(setting, chain="ksampler"))) <= 1e-4


def test_a_cache_works_in_it_and_reports(server: ComfyServer) -> None:
    cache = model_node(
        "SPFirstBlockCache", residual_diff_threshold=10.0, start_percent=0.0, end_percent=1.0, max_consecutive_hits=2
    )
    setting = fresh(Setting(steps=6, cfg=4.0, model_nodes=(cache,)))
    stepwise, log = log_of(server, setting)
    expected = CACHED.findall(log)
    latent, log = log_of(server, replace(setting, chain="sp_sampler"))
    assert CACHED.findall(log) == expected != []
    assert IN_WORKERS.search(log)
    assert relative_difference(latent, stepwise) <= 1e-4


EASY_CACHE = model_node("EasyCache", reuse_threshold=0.8, start_percent=0.0, end_percent=1.0, verbose=False)
CFG_ZERO = model_node("CFGZeroStar")


@pytest.mark.parametrize(("node", "reason"), [(EASY_CACHE, "easycache"), (CFG_ZERO, "CFGZeroStar")])
def test_nodes_that_look_at_every_step_are_sampled_stepwise(server: ComfyServer, node: tuple, reason: str) -> None:
    setting = fresh(Setting(steps=6, cfg=4.0, chain="sp_sampler", model_nodes=(node,)))
    latent, log = log_of(server, setting)
    (told,) = STEPWISE.findall(log)
    assert reason in told, told
    assert relative_difference(latent, sample(server, replace(setting, chain="ksampler"))) <= 1e-4


def test_shift_and_guidance_nodes_work_in_it(server: ComfyServer) -> None:
    setting = fresh(Setting(chain="sp_sampler", model_nodes=(model_node("ModelSamplingSD3", shift=3.0),)))
    latent, log = log_of(server, setting)
    assert IN_WORKERS.search(log)
    assert relative_difference(latent, sample(server, replace(setting, chain="ksampler"))) <= 1e-4


def test_a_model_of_another_loader_is_sampled_natively(server: ComfyServer) -> None:
    setting = fresh(Setting(chain="sp_sampler"))
    latent, log = log_of(server, setting, None)
    assert STEPWISE.findall(log) == ["this MODEL comes from another loader"]
    assert torch.equal(latent, sample(server, replace(setting, chain="ksampler")))


def test_the_model_stays_as_it_was(server: ComfyServer) -> None:
    """KSampler and Sampler (SP) on one MODEL, in one graph."""
    setting = fresh(Setting())
    builder = GraphBuilder()
    model = builder.add_loader(setting.checkpoint, TWO)
    add_sampling(builder, replace(setting, chain="sp_sampler"), model, "ours")
    add_sampling(builder, setting, model, OUTPUT)
    start = len(server.log())
    result = server.run(builder.graph)
    assert relative_difference(read_latent(server, result, "ours"), read_latent(server, result)) <= 1e-5
    assert len(IN_WORKERS.findall(server.log()[start:])) == 1


def test_what_is_refused_stepwise_is_refused_here(server: ComfyServer) -> None:
    guidance = model_node("PerturbedAttentionGuidance", scale=3.0)
    result = server.run(sampling_graph(fresh(Setting(cfg=4.0, chain="sp_sampler", model_nodes=(guidance,))), TWO))
    assert result.status == "error"
    assert "PerturbedAttentionGuidance" in result.message and "Load Diffusion Model (SP)" in result.message


@pytest.mark.slow
def test_cancel_stops_inside_a_step(server: ComfyServer) -> None:
    sample(server, fresh(VISIBLE), TWO)  # starting workers takes CPU time, too
    graph = sampling_graph(fresh(LONG), TWO)
    prompt_id = server.queue(graph)
    assert isinstance(prompt_id, str), prompt_id
    server.wait_for_node("SPSampler", graph, prompt_id)
    assert wait_until(lambda: len(server.workers()) >= 2, timeout=60)
    before = total_cpu_seconds(server.workers())
    assert wait_until(lambda: total_cpu_seconds(server.workers()) - before > 3, timeout=60)
    workers = server.workers()
    server.interrupt()
    assert server.wait(prompt_id).status == "interrupted"
    assert wait_until(lambda: not gains_cpu(workers, seconds=0.2, within=1.0), timeout=60), "they went on after Cancel"
    after = fresh(Setting(chain="sp_sampler"))
    assert relative_difference(sample(server, after, TWO), sample(server, replace(after, chain="ksampler"))) <= 1e-4
    assert server.workers() == workers
