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

from parallel.cache.settings import CacheSettings, FirstBlockCacheSettings, TeaCacheSettings
from parallel.diffusers.tiny import write_tiny
from parallel.errors import ConfigError
from parallel.host.cached_sampling import CachedSampling
from parallel.host.group import WorkerGroup
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.placement import Placement
from parallel.wire.messages import FreeMemory, Operation
from parallel.worker.free_memory import host_memory
from tests.distributed.changed_weights import WEIGHTS, changed
from tests.distributed.devices import kind
from tests.distributed.process_facts import MemoryPeaks, memory, weight_copies
from tests.distributed.start_ranks import run_ranks
from tests.distributed.tiny_models import (
    COGVIDEOX,
    FLUX,
    HUNYUAN,
    WAN,
    Inputs,
    Model,
    StartGroup,
    TinyModels,
    loaded,
    recipe_of,
    relative_difference,
    step,
)

MODES = ("shard", "offload")
TWO, FOUR = "cpu,cpu", "cpu,cpu,cpu,cpu"
MB = 10**6
PADDED = Inputs(frames=3, height=10, width=6, valid=(5,))
SOME = (
    "transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.1.proj_mlp.bias", "norm_out.linear.weight",
    "x_embedder.proj.bias",
)  # fmt: skip
bf16 = torch.bfloat16

MODELS = {
    "hunyuan_video": Model(PADDED),
    "flux": Model(Inputs(FLUX, frames=1, height=10, width=6, batch=2)),
    "wan_in_bf16": Model(Inputs(WAN, frames=3, height=10, width=6, dtype=bf16), {"heads": 3}, bf16),
    "cogvideox": Model(Inputs(COGVIDEOX)),
}


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_gives_the_same(start_group: StartGroup, tiny_models: TinyModels, name: str):
    model, results = MODELS[name], {}
    for weights in ("replicate", *MODES):
        with loaded(start_group(TWO), model.path(tiny_models), model.weight_dtype, weights=weights) as remote:
            results[weights] = [step(remote, model.inputs) for _ in range(2)]
            assert remote.weights.placement == Placement(mode=weights, reason="as asked")
    for weights in MODES:
        for actual in results[weights]:
            # Not the bits: on some CPUs a product of one row depends on where in memory the weight begins.
            torch.testing.assert_close(actual, results["replicate"][0], rtol=0, atol=1e-5)


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
    path = tiny_models.path()
    requests = [replace(PADDED, batch=b, valid=(5,) * b).make(f"{b}") for b in (1, 2)]
    with loaded(start_group("cpu"), path) as alone:
        expected = alone.steps(requests, conditions=2)
    with loaded(start_group(devices), path, weights=weights, **degrees) as remote:
        actual = remote.steps(requests, conditions=2)
        (single,) = remote.steps(requests[:1])
    for a, b in zip([*actual, single], [*expected, expected[0]], strict=True):
        assert relative_difference(a, b) <= kind().split


@pytest.mark.parametrize("weights", MODES)
def test_cond_and_uncond(start_group: StartGroup, tiny_models: TinyModels, weights: str):
    """Automatic degrees would run them side by side: sharded weights need both ranks for each."""
    requests = [PADDED.make("cond"), replace(PADDED, seed=1).make("uncond")]
    with loaded(start_group(TWO), tiny_models.path(), weights=weights) as remote:
        remote.steps(requests, conditions=2)
        assert remote.degrees(2).sp == (2 if weights == "shard" else 1)


@pytest.mark.parametrize("weights", MODES)
def test_replaced_weights(start_group: StartGroup, tiny_models: TinyModels, weights: str):
    path = tiny_models.path()
    results: dict[str, list[Tensor]] = {}
    for mode in ("replicate", weights):
        with loaded(start_group(TWO), path, weights=mode) as remote:
            results[mode] = [step(remote, PADDED)]
            remote.weights.replace("changed", SOME, changed(path))
            results[mode].append(step(remote, PADDED))
            remote.weights.replace(None, (), changed(path))
            results[mode].append(step(remote, PADDED))
    assert not torch.equal(results[weights][0], results[weights][1])
    for actual, expected in zip(results[weights], results["replicate"], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(
    ("model", "cache"),
    [
        pytest.param(Model(), FirstBlockCacheSettings(residual_diff_threshold=1e9, max_consecutive_hits=2), id="fbc"),
        pytest.param(
            # TeaCache knows Wan by its size: this many heads are the 1.3B model's
            Model(Inputs(WAN), {"heads": 12, "attention_head_dim": 32}), TeaCacheSettings(rel_l1_thresh=1e9), id="tea"
        ),
    ],
)  # fmt: skip
def test_steps_that_skip_blocks(
    start_group: StartGroup, tiny_models: TinyModels, model: Model, cache: CacheSettings, weights: str
):
    results: dict[str, list[Tensor]] = {}
    hits = {}
    request = model.inputs.make()
    for mode in ("replicate", weights):
        with loaded(start_group(TWO), model.path(tiny_models), weights=mode) as remote:
            sampling = CachedSampling(cache)
            results[mode] = [
                remote.steps([replace(request, x=request.x * (1 + i / 50))], cache=sampling)[0] for i in range(5)
            ]
            hits[mode] = sampling.report.hits
    assert hits[weights] == hits["replicate"] > 0
    for actual, expected in zip(results[weights], results["replicate"], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("weights", MODES)
def test_cancel_leaves_the_weights_in_place(start_group: StartGroup, tiny_models: TinyModels, weights: str):
    """At any time: while loading, and inside a step."""
    group, path = start_group(TWO), tiny_models.path(num_single_layers=40)
    long = replace(PADDED, frames=9, height=32, width=32)

    def after(polls: int) -> Callable[[], None]:
        left = iter(range(polls))

        def poll() -> None:
            if next(left, None) is None:
                raise Cancelled

        return poll

    with loaded(group, path) as remote:
        expected = step(remote, PADDED)
    with pytest.raises(Cancelled):
        RemoteModel(recipe_of(path, TWO, weights=weights), group=group).weights.ensure_loaded(poll=after(0))
    with loaded(group, path, weights=weights) as remote:
        for polls in (0, 2):
            with pytest.raises(Cancelled):
                remote.steps([long.make()], poll=after(polls))
            assert torch.equal(step(remote, PADDED), expected)


@pytest.mark.slow
def test_blocks_are_gathered_one_by_one_or_one_ahead(tiny_models: TinyModels, tmp_path: Path):
    """Four blocks on two ranks that share a sequence; also after steps that were broken off."""
    for text in run_ranks("tests.distributed.sharded_ranks", 2, tmp_path, [str(tiny_models.path())]):
        at_need, ahead = json.loads(text)
        assert at_need["counts"] == [0, 1, 1, 1]  # before a block its predecessor is still here
        assert ahead["counts"] == [0, 2, 2, 2]
        for answer in (at_need, ahead):
            assert answer["equal"] == [True, True]
            assert answer["left"] == [0, 0]
            assert answer["after"] == 0


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 200 MB of fp32, in blocks of 13 to 40 MB."""
    path = tmp_path_factory.mktemp("large")
    write_tiny(path, HUNYUAN, heads=4, num_layers=1, num_single_layers=8)
    yield path
    (path / WEIGHTS).unlink()


@pytest.fixture
def idle(start_group: StartGroup, tiny_models: TinyModels) -> WorkerGroup:
    """Workers that have run a step in each mode and given back what they could: what comes now is weights."""
    group = start_group(TWO)
    for weights in MODES:
        with loaded(group, tiny_models.path(), weights=weights) as remote:
            step(remote, PADDED)
    group.call(FreeMemory())
    return group


@pytest.mark.slow
@pytest.mark.cpu_ranks("resident memory")
def test_a_sharded_worker_never_holds_more_than_its_part(idle: WorkerGroup, large: Path):
    """Beside the weights, steps leave a few buffers, which stay after the weights have gone."""
    recipe = recipe_of(large, TWO, weights="shard")
    model = RemoteModel(recipe, group=idle)
    with MemoryPeaks(idle.pids) as loading:
        assert model.weights.ensure_loaded() <= 0.51 * recipe.nbytes
    for _ in range(2):
        step(model, PADDED)
    at_rest = {pid: memory(pid, "Anon") for pid in idle.pids}
    model.weights.unload()
    for pid in idle.pids:
        most, rest = loading.peak[pid] - loading.before[pid], at_rest[pid] - memory(pid, "Anon")
        print(
            f"of {recipe.nbytes / MB:.0f} MB: {most / MB:.0f} MB at most in loading, {rest / MB:.0f} MB between steps"
        )
        assert max(most, rest) <= 0.6 * recipe.nbytes
        assert rest >= 0.45 * recipe.nbytes, "the weights have not been seen"


@pytest.mark.cpu_ranks("resident memory")
def test_offloaded_weights_are_in_memory_once(idle: WorkerGroup, large: Path):
    recipe = recipe_of(large, TWO, weights="offload")
    whole, everyone = recipe.nbytes, [os.getpid(), *idle.pids]
    before = {pid: memory(pid, "Anon") for pid in everyone}
    shared_before = weight_copies(idle.pids)
    model = RemoteModel(recipe, group=idle)
    with MemoryPeaks(everyone) as loading:
        model.weights.ensure_loaded()
    step(model, PADDED)
    for when, own in (("while loading", loading.peak), ("after a step", {p: memory(p, "Anon") for p in everyone})):
        used = sum(max(0, own[pid] - before[pid]) for pid in everyone) + weight_copies(idle.pids) - shared_before
        print(f"{used / MB:.0f} MB for a file of {whole / MB:.0f} MB {when}")
        assert used <= 1.2 * whole
    assert weight_copies(idle.pids) - shared_before >= 0.99 * whole, "the copy has not been seen"
    model.weights.unload()
    assert weight_copies(idle.pids) == shared_before


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["replicate", *MODES])
def test_two_models_stay_loaded(
    start_group: StartGroup, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, weights: str
):
    """As Wan 2.2's two: prompt after prompt goes from one to the other."""
    group, operations = start_group(TWO), []
    call = group.call

    def spy(message: Operation, **options: Any) -> Any:
        operations.append(message.name)
        return call(message, **options)

    monkeypatch.setattr(group, "call", spy)
    paths = [tiny_models.path(WAN, seed=seed) for seed in (0, 1)]
    with loaded(group, paths[0], weights=weights) as high, loaded(group, paths[1], weights=weights) as low:
        results = []
        for _ in range(3):
            for model in (high, low):
                model.weights.ensure_loaded()
                results.append(step(model, Inputs(WAN)))
    assert operations.count("load") == 2
    assert all(torch.equal(results[i], results[i % 2]) for i in range(6))
    assert not torch.equal(results[0], results[1])


@contextmanager
def with_figures(group: WorkerGroup, recipe: Recipe, **figures: Any) -> Iterator[RemoteModel]:
    """The model, of which the host believes these figures."""
    model = RemoteModel(replace(recipe, **figures), group=group)
    model.weights.ensure_loaded()
    try:
        yield model
    finally:
        model.weights.unload()


@pytest.mark.cpu_ranks("memory of the host")
def test_auto_decides_by_free_memory_and_says_why(start_group: StartGroup, tiny_models: TinyModels):
    """A mapped file costs nothing; what is cast costs each worker a copy."""
    group, path = start_group(TWO), tiny_models.path()
    gib = f"{recipe_of(path, TWO).nbytes / 2**30:.3g} GiB"
    with loaded(group, path, weights="auto") as remote:
        expected = step(remote, PADDED)
        reason = f"auto: all workers use {gib} where the file is mapped"
        assert remote.weights.placement == Placement(mode="replicate", reason=reason)
    recipe = recipe_of(path, TWO, weights="auto")
    with with_figures(group, recipe, in_the_file=0) as remote:
        assert remote.weights.placement == Placement(mode="replicate", reason=f"auto: 2 × {gib} fit in memory")
    size = int(0.7 * host_memory().free)
    with with_figures(group, recipe, nbytes=size, in_the_file=0) as remote:
        assert remote.weights.placement is not None and remote.weights.placement.mode == "offload"
        assert f"auto: 2 × {size / 2**30:.3g} GiB do not fit in" in remote.weights.placement.reason
        assert torch.equal(step(remote, PADDED), expected)
    refused = pytest.raises(ConfigError, match=r"needs 1.05e\+06 GiB of host memory for its copy")
    with refused, with_figures(group, recipe, nbytes=2**50, in_the_file=0):
        pass
