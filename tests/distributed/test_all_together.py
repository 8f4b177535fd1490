"""Everything at once: any plan with a cache, FP8 weights and replaced weights, in every combination."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.diffusers.tensors import mapped
from parallel.host.cached_sampling import CachedSampling
from parallel.host.remote_model import RemoteModel
from parallel.quantise.settings import FP8Settings
from parallel.sampling.step_request import StepRequest
from tests.distributed.devices import kind
from tests.distributed.tiny_models import WAN, Inputs, StartGroup, TinyModels, recipe_of, relative_difference

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
PATCHED = ("blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.2.weight", "proj_out.weight")
STEPS, HITS = 3, [0, 2, 2]
"""Hits of cond and uncond at each step: the first one has nothing to remember."""
TOLERANCE = kind().reference
"""Wider than for a split alone: FP8 rounds what differs in the last bit of fp32 to either side."""


class Choice(NamedTuple):
    """What is switched on besides the plan."""

    cache: bool
    fp8: bool
    lora: bool


CHOICES = sorted((Choice(*chosen) for chosen in itertools.product((False, True), repeat=3)), key=lambda c: c.fp8)
"""Those in FP8 together: it is a reason to load the model anew."""


class Run(NamedTuple):
    """What one sampling has given."""

    results: list[list[Tensor]]
    hits: list[int]


def requests(step: int) -> list[StepRequest]:
    """cond and uncond, the latent and the timestep moving."""
    made = Inputs(WAN, frames=3, height=10, width=6).make("cond")
    made = replace(made, x=made.x * (1 - 0.05 * step), timestep=made.timestep - 100 * step)
    negative = {name: tensor * 0.5 for name, tensor in made.conditioning.items()}
    return [made, replace(made, conditioning=negative, label="uncond")]


def sample(model: RemoteModel, choice: Choice) -> Run:
    model.weights.ensure_loaded(fp8=FP8Settings(scheme="weight_only") if choice.fp8 else None)
    tensors = mapped(model.recipe.path)
    patched = PATCHED if choice.lora else ()
    model.weights.replace("lora" if choice.lora else None, patched, lambda name: 0.1 - tensors[name])
    cache = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=10.0)) if choice.cache else None
    results, hits = [], []
    for step in range(STEPS):
        results.append(model.steps(requests(step), conditions=2, cache=cache))
        if cache is not None:
            ranks = model.degrees(2).sp  # those of one group count alike
            hits.append(sum(told["cache"]["hits"] for told in model.last_step[::ranks]))
    return Run(results, hits)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.extended
@pytest.mark.parametrize("devices", PLANS)
def test_every_combination_gives_what_one_process_gives(start_group: StartGroup, tiny_models: TinyModels, devices: str):
    path = tiny_models.path(WAN)
    alone = RemoteModel(recipe_of(path, "cpu"), group=start_group("cpu"))
    expected = {choice: sample(alone, choice) for choice in CHOICES}
    alone.weights.unload()
    uncached = [run.results[-1][0] for choice, run in expected.items() if not choice.cache]
    for first, second in itertools.combinations(uncached, 2):
        assert relative_difference(first, second) > 10 * TOLERANCE, "FP8 or the LoRA does nothing"
    for plan, degrees in PLANS[devices].items():
        model = RemoteModel(recipe_of(path, devices, **degrees), group=start_group(devices))
        for choice in CHOICES:
            check(sample(model, choice), expected[choice], f"{plan}, {choice}")
        model.weights.unload()


def check(run: Run, reference: Run, case: str) -> None:
    for found, wanted in zip(run.results, reference.results, strict=True):
        for actual, expected in zip(found, wanted, strict=True):
            assert relative_difference(actual, expected) <= TOLERANCE, case
    assert run.hits == reference.hits, case
    if run.hits:
        assert run.hits == HITS, case
