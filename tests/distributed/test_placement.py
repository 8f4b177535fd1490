"""Sharded and offloaded weights on CPU workers: the result of replicated ones, to the bit, in less memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.cache.settings import FirstBlockCacheSettings, TeaCacheSettings
from parallel.checkpoints.source import Stored
from parallel.demo.checkpoint import write_tiny_hunyuan_video
from parallel.errors import ConfigError
from parallel.host import remote_weights
from parallel.host.cached_sampling import CachedSampling
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.host.step_request import StepRequest
from parallel.placement import Placement
from parallel.worker.free_memory import host_memory
from tests.distributed.devices import kind
from tests.distributed.process_facts import MemoryPeaks, memory, weight_copies
from tests.distributed.start_ranks import run_ranks
from tests.distributed.tiny_models import (
    Inputs,
    Model,
    StartGroup,
    TinyModels,
    WanInputs,
    recipe_of,
    relative_difference,
)

MODES = ("shard", "offload")
TWO, FOUR = "cpu,cpu", "cpu,cpu,cpu,cpu"
MB = 10**6
DEEP = {"depth": 2, "depth_single": 2}
PADDED = Inputs(frames=3, height=10, width=6, valid=(5,))
QKV = "double_blocks.0.img_attn.qkv.weight"
SOME = (QKV, "single_blocks.0.linear1.bias", "final_layer.adaLN_modulation.1.weight", "img_in.proj.bias")
fp8 = torch.float8_e4m3fn

MODELS = {
    "hunyuan_video": Model(DEEP, PADDED),
    "scaled_fp8": Model({"scaled": "comfy_quant"}, PADDED),
    "flux": Model(
        {"family": "flux"}, Inputs(frames=None, height=9, width=7, references=((4, 12),), sigma=True, batch=2)
    ),
    "wan_fp8_storage": Model({"family": "wan", "context_dim": 64, "heads": 3}, WanInputs(frames=3, height=9), fp8),
}  # fmt: skip


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@contextmanager
def placed(group: WorkerGroup, path: Path, weights: str, dtype: torch.dtype = torch.float32, **degrees: int):
    """The model on this group, its weights in this mode, for the time of the `with` block."""
    recipe = recipe_of(path, group.layout.describe(), dtype, **degrees)
    model = RemoteModel(replace(recipe, config=replace(recipe.config, weights=weights)), group=group)
    model.ensure_loaded()
    try:
        yield model
    finally:
        model.unload()


def change(name: str, stored: Stored) -> Stored:
    """What a LoRA stands for here."""
    tensor, scale = stored
    if scale is not None:
        return Stored((tensor.float() * -0.7).to(tensor.dtype), scale * 1.5)
    return Stored((tensor.float() * 1.5 + 0.01).to(tensor.dtype))


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_gives_the_same_bits(start_group: StartGroup, tiny_models: TinyModels, name: str):
    model, results = MODELS[name], {}
    for weights in ("replicate", *MODES):
        with placed(start_group(TWO), tiny_models.path(**model.checkpoint), weights, model.weight_dtype) as remote:
            results[weights] = [remote.step(*model.inputs.make()) for _ in range(2)]
            assert remote.placement == Placement(mode=weights, reason="as asked")
    for weights in MODES:
        for actual in results[weights]:
            assert torch.equal(actual, results["replicate"][0])


@pytest.mark.parametrize(
    ("weights", "devices", "degrees"),
    [
        ("shard", "cpu*3,cpu,cpu", {}),
        ("shard", FOUR, {"cfg_degree": 2}),
        ("shard", FOUR, {"ulysses_degree": 2, "ring_degree": 2}),
        ("offload", FOUR, {"dp_degree": 2, "ring_degree": 2}),
    ],
)
def test_every_plan(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int], weights: str
):
    """With cfg 2, two groups share out the weights each for themselves, and one of them may have nothing to do."""
    path = tiny_models.path(**DEEP)
    requests = [StepRequest(*replace(PADDED, batch=b).make(), label=f"{b}") for b in (1, 2)]
    with placed(start_group("cpu"), path, "replicate") as alone:
        expected = alone.steps(requests, conditions=2)
    with placed(start_group(devices), path, weights, **degrees) as remote:
        actual = remote.steps(requests, conditions=2)
        (single,) = remote.steps(requests[:1])
    for a, b in zip([*actual, single], [*expected, expected[0]], strict=True):
        assert relative_difference(a, b) <= kind().split


@pytest.mark.parametrize("weights", MODES)
def test_cond_and_uncond(start_group: StartGroup, tiny_models: TinyModels, weights: str):
    """Automatic degrees would run them side by side: sharded weights need both ranks for each."""
    requests = [StepRequest(*PADDED.make()), StepRequest(*replace(PADDED, seed=1).make())]
    with placed(start_group(TWO), tiny_models.path(**DEEP), weights) as remote:
        remote.steps(requests, conditions=2)
        assert remote.degrees(2).sp == (2 if weights == "shard" else 1)


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("checkpoint", [DEEP, DEEP | {"scaled": "comfy_quant"}], ids=["fp32", "scaled_fp8"])
def test_replaced_weights(start_group: StartGroup, tiny_models: TinyModels, checkpoint: dict[str, Any], weights: str):
    results: dict[str, list[Tensor]] = {}
    for mode in ("replicate", weights):
        with placed(start_group(TWO), tiny_models.path(**checkpoint), mode) as remote:
            results[mode] = [remote.step(*PADDED.make())]
            remote.replace_weights("changed", SOME, change)
            results[mode].append(remote.step(*PADDED.make()))
            remote.replace_weights(None, (), change)
            results[mode].append(remote.step(*PADDED.make()))
    assert not torch.equal(results[weights][0], results[weights][1])
    for actual, expected in zip(results[weights], results["replicate"], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheSettings(residual_diff_threshold=1e9, max_consecutive_hits=2),
        TeaCacheSettings(rel_l1_thresh=1e9),
    ],
    ids=["first_block", "teacache"],
)
def test_steps_that_skip_blocks(start_group: StartGroup, tiny_models: TinyModels, cache: Any, weights: str):
    results: dict[str, list[Tensor]] = {}
    hits = {}
    x, timestep, conditioning = PADDED.make()
    for mode in ("replicate", weights):
        with placed(start_group(TWO), tiny_models.path(**DEEP), mode) as remote:
            sampling = CachedSampling(cache)
            results[mode] = [
                remote.steps([StepRequest(x * (1 + i / 50), timestep, conditioning)], cache=sampling)[0]
                for i in range(5)
            ]
            hits[mode] = sampling.report.hits
    assert hits[weights] == hits["replicate"] > 0
    for actual, expected in zip(results[weights], results["replicate"], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("weights", MODES)
def test_cancel_leaves_the_weights_in_place(start_group: StartGroup, tiny_models: TinyModels, weights: str):
    """At any time: while loading, and inside a step."""
    group, path = start_group(TWO), tiny_models.path(heads=2, depth=2, depth_single=6)
    long = replace(PADDED, frames=9, height=32, width=32)

    def after(polls: int) -> Callable[[], None]:
        left = iter(range(polls))

        def poll() -> None:
            if next(left, None) is None:
                raise Cancelled

        return poll

    with placed(group, path, "replicate") as remote:
        expected = remote.step(*PADDED.make())
    recipe = recipe_of(path, TWO)
    other = RemoteModel(replace(recipe, config=replace(recipe.config, weights=weights)), group=group)
    with pytest.raises(Cancelled):
        other.ensure_loaded(poll=after(0))
    with placed(group, path, weights) as remote:
        for polls in (0, 2):
            with pytest.raises(Cancelled):
                remote.step(*long.make(), poll=after(polls))
            assert torch.equal(remote.step(*PADDED.make()), expected)


def test_blocks_are_gathered_one_by_one_or_one_ahead(tiny_models: TinyModels, tmp_path: Path):
    """Four blocks on two ranks, each with the whole sequence; also after steps that were broken off."""
    path = tiny_models.path(**DEEP)
    for text in run_ranks("tests.distributed.sharded_ranks", 2, tmp_path, [str(path)]):
        at_need, ahead = json.loads(text)
        assert at_need["counts"] == [1, 1, 1, 1]
        # Not counted is what is still on its way: the block ahead is whole when its turn has come.
        assert max(ahead["counts"]) <= 2
        for answer in (at_need, ahead):
            assert answer["equal"] == [True, True]
            assert answer["left"] == [0, 0]
            assert answer["after"] == 0


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 200 MB of fp32, in blocks of 16 MB."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    write_tiny_hunyuan_video(path, heads=4, depth=1, depth_single=8)
    yield path
    path.unlink()


@pytest.fixture
def idle(start_group: StartGroup, tiny_models: TinyModels) -> WorkerGroup:
    """Workers that have run a step in each mode and given back what they could: what comes now is weights."""
    group = start_group(TWO)
    for weights in MODES:
        with placed(group, tiny_models.path(**DEEP), weights) as remote:
            remote.step(*PADDED.make())
    group.call("free memory", {})
    return group


@pytest.mark.cpu_ranks("resident memory")
def test_a_sharded_worker_never_holds_more_than_its_part(idle: WorkerGroup, large: Path):
    """Beside the weights, steps leave a few buffers, which stay after the weights have gone."""
    whole = large.stat().st_size
    recipe = recipe_of(large, TWO)
    model = RemoteModel(replace(recipe, config=replace(recipe.config, weights="shard")), group=idle)
    with MemoryPeaks(idle.pids) as loading:
        assert model.ensure_loaded() <= 0.51 * whole
    for _ in range(2):
        model.step(*PADDED.make())
    at_rest = {pid: memory(pid, "Anon") for pid in idle.pids}
    model.unload()
    for pid in idle.pids:
        loaded, rest = loading.peak[pid] - loading.before[pid], at_rest[pid] - memory(pid, "Anon")
        print(f"of {whole / MB:.0f} MB: {loaded / MB:.0f} MB at most while loading, {rest / MB:.0f} MB between steps")
        assert max(loaded, rest) <= 0.6 * whole
        assert rest >= 0.45 * whole, "the weights have not been seen"


@pytest.mark.cpu_ranks("resident memory")
def test_offloaded_weights_are_in_memory_once(idle: WorkerGroup, large: Path):
    whole, everyone = large.stat().st_size, [os.getpid(), *idle.pids]
    before = {pid: memory(pid, "Anon") for pid in everyone}
    shared_before = weight_copies(idle.pids)
    recipe = recipe_of(large, TWO)
    model = RemoteModel(replace(recipe, config=replace(recipe.config, weights="offload")), group=idle)
    with MemoryPeaks(everyone) as loading:
        model.ensure_loaded()
    model.step(*PADDED.make())
    for when, own in (("while loading", loading.peak), ("after a step", {p: memory(p, "Anon") for p in everyone})):
        used = sum(max(0, own[pid] - before[pid]) for pid in everyone) + weight_copies(idle.pids) - shared_before
        print(f"{used / MB:.0f} MB for a file of {whole / MB:.0f} MB {when}")
        assert used <= 1.2 * whole
    assert weight_copies(idle.pids) - shared_before >= 0.99 * whole, "the copy has not been seen"
    model.unload()
    assert weight_copies(idle.pids) == shared_before


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["replicate", *MODES])
def test_two_models_stay_loaded(
    start_group: StartGroup, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, weights: str
):
    """As Wan 2.2's two: prompt after prompt goes from one to the other."""
    group, operations = start_group(TWO), []
    call = group.call
    monkeypatch.setattr(group, "call", lambda name, *rest, **more: operations.append(name) or call(name, *rest, **more))
    paths = [tiny_models.path("wan", context_dim=64, seed=seed) for seed in (0, 1)]
    with placed(group, paths[0], weights) as high, placed(group, paths[1], weights) as low:
        results = []
        for _ in range(3):
            for model in (high, low):
                model.ensure_loaded()
                results.append(model.step(*WanInputs().make()))
    assert operations.count("load") == 2
    assert all(torch.equal(results[i], results[i % 2]) for i in range(6))
    assert not torch.equal(results[0], results[1])


@pytest.mark.cpu_ranks("memory of the host")
def test_auto_decides_by_free_memory_and_says_why(
    start_group: StartGroup, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
):
    path = tiny_models.path(**DEEP)
    with placed(start_group(TWO), path, "auto") as remote:
        expected = remote.step(*PADDED.make())
        assert remote.placement == Placement(mode="replicate", reason="auto: 2 × 0.0353 GiB fit in memory")
    size = int(0.7 * host_memory().free)
    monkeypatch.setattr(remote_weights, "weight_bytes", lambda *_: size)
    with placed(start_group(TWO), path, "auto") as remote:
        assert remote.placement.mode == "offload"
        assert f"auto: 2 × {size / 2**30:.3g} GiB do not fit in" in remote.placement.reason
        assert torch.equal(remote.step(*PADDED.make()), expected)
    monkeypatch.setattr(remote_weights, "weight_bytes", lambda *_: 2**50)
    refused = pytest.raises(ConfigError, match=r"needs 1.05e\+06 GiB of host memory for its copy")
    with refused, placed(start_group(TWO), path, "auto"):
        pass
