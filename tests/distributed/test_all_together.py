"""Everything at once: any plan with a cache, FP8 weights, compiled blocks and a LoRA, in every combination."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.compilation.folder import VARIABLE
from parallel.compilation.settings import CompileSettings
from parallel.config import SequenceParallelConfig, resolve
from parallel.host.cached_sampling import CachedSampling
from parallel.host.compiled_sampling import CompiledSampling
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.host.step_request import StepRequest
from parallel.quantise.settings import FP8Settings
from tests.distributed.devices import kind, on_ranks
from tests.distributed.test_weights import change
from tests.distributed.tiny_models import TinyModels, WanInputs, recipe_of, relative_difference

PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu,cpu": {
        "ulysses": {"cfg_degree": 1},
        "ring": {"ring_degree": 2},
        "cfg": {"cfg_degree": 2},
        "sharded": {"weights": "shard"},
        "offloaded": {"weights": "offload"},
    },
    "cpu,cpu,cpu,cpu": {"cfg_and_ulysses": {"cfg_degree": 2, "ulysses_degree": 2}},
}
"""Devices → plans, each of `SequenceParallelConfig`."""
PATCHED = ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight", "head.head.weight")
STEPS, HITS = 3, [0, 2, 2]
"""Hits of cond and uncond at each step: the first one has nothing to remember."""
TOLERANCE = kind().reference
"""Wider than for a split alone: FP8 rounds what differs in the last bit of fp32 to either side."""


class Choice(NamedTuple):
    """What is switched on besides the plan."""

    cache: bool
    fp8: bool
    compiled: bool
    lora: bool


CHOICES = sorted((Choice(*chosen) for chosen in itertools.product((False, True), repeat=4)), key=lambda c: c.fp8)
"""Those in FP8 together: it is a reason to load the model anew."""


UNCOMPILED = [choice for choice in CHOICES if not choice.compiled]
EVERYTHING = Choice(cache=True, fp8=True, compiled=True, lora=True)


class Run(NamedTuple):
    """What one sampling has given."""

    results: list[list[Tensor]]
    hits: list[int]
    compiled: CompiledSampling | None


def requests(step: int) -> list[StepRequest]:
    """cond and uncond, the latent and the timestep moving."""
    x, timestep, conditioning = WanInputs(frames=3, height=9, width=7).make()
    negative = {name: tensor * 0.5 for name, tensor in conditioning.items()}
    x, timestep = x * (1 - 0.05 * step), timestep - 100 * step
    return [StepRequest(x, timestep, conditioning, "cond"), StepRequest(x, timestep, negative, "uncond")]


def sample(model: RemoteModel, choice: Choice) -> Run:
    model.ensure_loaded(fp8=FP8Settings(scheme="weight_only") if choice.fp8 else None)
    model.replace_weights("lora" if choice.lora else None, PATCHED if choice.lora else (), change)
    cache = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=10.0)) if choice.cache else None
    compiled = CompiledSampling(CompileSettings()) if choice.compiled else None
    results, hits = [], []
    for step in range(STEPS):
        results.append(model.steps(requests(step), conditions=2, cache=cache, compiled=compiled))
        if cache is not None:
            ranks = model.degrees(2).sp  # those of one group count alike
            hits.append(sum(told["cache"]["hits"] for told in model.last_step[::ranks]))
    return Run(results, hits, compiled)


@contextmanager
def workers(folder: Path, devices: str) -> Iterator[WorkerGroup]:
    """A group that keeps compiled code in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        group = WorkerGroup(resolve(SequenceParallelConfig(devices=on_ranks(devices))), threads=1)
        group.start()
    try:
        yield group
    finally:
        group.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.extended
@pytest.mark.parametrize("devices", PLANS)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_every_combination_gives_what_one_process_gives(tiny_models: TinyModels, tmp_path: Path, devices: str):
    path = tiny_models.path("wan", context_dim=64, depth=2)
    with workers(tmp_path, "cpu") as group:
        alone = RemoteModel(recipe_of(path, "cpu"), group=group)
        expected = {choice: sample(alone, choice) for choice in UNCOMPILED}
    uncached = [run.results[-1][0] for choice, run in expected.items() if not choice.cache]
    for first, second in itertools.combinations(uncached, 2):
        assert relative_difference(first, second) > 10 * TOLERANCE, "FP8 or the LoRA does nothing"
    with workers(tmp_path, devices) as group:
        for plan, degrees in PLANS[devices].items():
            model = RemoteModel(recipe_of(path, devices, **degrees), group=group)
            # Compiling takes longest: all combinations with it for one plan, the fullest one for the others.
            for choice in CHOICES if plan == "ulysses" else [*UNCOMPILED, EVERYTHING]:
                check(sample(model, choice), expected[choice._replace(compiled=False)], f"{plan}, {choice}")
            model.unload()


def check(run: Run, reference: Run, case: str) -> None:
    for found, wanted in zip(run.results, reference.results, strict=True):
        for actual, expected in zip(found, wanted, strict=True):
            assert relative_difference(actual, expected) <= TOLERANCE, case
    assert run.hits == reference.hits, case
    if run.hits:
        assert run.hits == HITS, case
    if run.compiled is not None:
        report = run.compiled.report
        assert report.kinds == 1 and not report.failures and not report.breaks, (case, report)
