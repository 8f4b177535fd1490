"""First Block Cache and TeaCache on CPU workers: the same decision on all ranks of a sequence, and the right result."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention import kernels
from parallel.cache import coefficients
from parallel.cache.blocks import Blocks, Probe
from parallel.cache.settings import CacheSettings, FirstBlockCacheSettings, TeaCacheSettings
from parallel.checkpoints.source import Stored
from parallel.host import group as group_module
from parallel.host.cached_sampling import CachedSampling
from parallel.host.remote_model import RemoteModel
from parallel.host.step_request import StepRequest
from parallel.measure import QuietRounds
from parallel.plan import SequencePlan
from parallel.worker.ranks import SoloContext
from parallel.worker.resident import ResidentModel
from tests.distributed.devices import kind
from tests.distributed.tiny_models import (
    CogVideoXInputs,
    Flux2Inputs,
    Hunyuan15Inputs,
    Inputs,
    LTXVInputs,
    MochiInputs,
    Model,
    QwenImageInputs,
    StartGroup,
    TinyModels,
    WanInputs,
    loaded,
    relative_difference,
)
from tests.thinned import one_in

FOUR = "cpu,cpu,cpu,cpu"
SPLIT_TOLERANCE, PROCESS_TOLERANCE = kind().split, kind().process
NEVER = 0.0
ALWAYS = 1e9

MODELS = {
    "hunyuan_video": Model({"depth": 2, "depth_single": 2}, Inputs(frames=3, height=10, width=6, valid=(5,))),
    "hunyuan_video_batch_2": Model(
        {"depth": 2, "depth_single": 2}, Inputs(batch=2, valid=(5, 8), frames=3, height=6)
    ),
    "flux": Model(
        {"family": "flux", "depth_single": 2},
        Inputs(frames=None, height=9, width=7, references=((4, 12),), sigma=True, batch=2),
    ),
    # TeaCache knows Wan by its size: this many heads are the 1.3B model's.
    "wan": Model({"family": "wan", "heads": 12, "context_dim": 64}, WanInputs(frames=3, height=9, width=7, batch=2)),
}  # fmt: skip

# Compared under two plans only, see SKIPPED.
OTHERS = {
    "hunyuan_video_15": Model({"family": "hunyuan_video_15"}, Hunyuan15Inputs(frames=3, height=5, width=3)),
    "cogvideox": Model({"family": "cogvideox"}, CogVideoXInputs(frames=3, height=9, width=7, batch=2)),
    "mochi": Model({"family": "mochi", "depth": 3}, MochiInputs(frames=3, height=6, width=10, valid=3, batch=2)),
    "ltxv": Model(
        {"family": "ltxv", "causal": True},
        LTXVInputs(frames=3, height=3, width=5, valid=(5, 8), clean_frames=1, batch=2),
    ),
    "qwen_image": Model(
        {"family": "qwen_image", "clean_references": True},
        QwenImageInputs(height=9, width=7, valid=(5,), references=((4, 12),)),
    ),
    "flux2": Model(
        {"family": "flux2"},
        Flux2Inputs(height=5, width=3, references=((3, 2),), method="index_timestep_zero", batch=2),
    ),
}

PLANS: list[tuple[str, dict[str, int]]] = [
    ("cpu", {}),
    ("cpu,cpu", {}),
    ("cpu,cpu", {"ring_degree": 2}),
    ("cpu,cpu", {"dp_degree": 2}),
    ("cpu*3,cpu,cpu", {}),
    (FOUR, {"ulysses_degree": 2, "ring_degree": 2}),
    (FOUR, {"dp_degree": 2}),
]


def first_block(threshold: float, **options: Any) -> FirstBlockCacheSettings:
    return FirstBlockCacheSettings(residual_diff_threshold=threshold, **options)


def teacache(threshold: float, **options: Any) -> TeaCacheSettings:
    return TeaCacheSettings(rel_l1_thresh=threshold, **options)


KINDS: dict[str, Callable[..., CacheSettings]] = {"first_block": first_block, "teacache": teacache}


def trajectory(model: Model, steps: int, change: float = 0.05) -> list[StepRequest]:
    """The latent moves by `change` of its size at each step, and the timestep falls."""
    x, timestep, conditioning = model.inputs.make()
    away = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return [StepRequest(x + i * change * away, timestep * (1 - i / (2 * steps)), conditioning) for i in range(steps)]


def tallies(remote: RemoteModel) -> list[dict[str, Any]]:
    """Each rank's of the last step."""
    return [result["cache"] for result in remote.last_step]


def hits(remote: RemoteModel) -> list[int]:
    return [tally["hits"] for tally in tallies(remote)]


# --- threshold 0 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "degrees"),
    [
        pytest.param(name, *plan, marks=[] if name == "hunyuan_video" and plan in PLANS[1:4] else pytest.mark.extended)
        for name in MODELS
        for plan in PLANS
    ],
)
def test_threshold_zero_changes_no_bit(
    start_group: StartGroup, tiny_models: TinyModels, name: str, devices: str, degrees: dict[str, int]
):
    model = MODELS[name]
    caches = [CachedSampling(kind(NEVER)) for kind in KINDS.values()]
    with loaded(start_group(devices), tiny_models.path(**model.checkpoint), **degrees) as remote:
        for request in trajectory(model, 3, change=0.0):
            (plain,) = remote.steps([request])
            for cache in caches:
                (cached,) = remote.steps([request], cache=cache)
                assert torch.equal(cached, plain)
    for cache in caches:
        assert cache.report.hits == 0
        assert cache.report.passes >= 3


# --- the same decisions, computed by one process without a cache --------------------------------------------------


class Scripted(SoloContext):
    """Skips when told to, and keeps what each pass's blocks have added."""

    def __init__(self) -> None:
        super().__init__(kernels.select("auto", torch.device("cpu")))
        self.skip: list[bool] = []
        """Of each pass of the next step."""
        self.whole = False
        """Whether all blocks are skipped, or all but the first."""
        self.rest: dict[int, Tensor] = {}
        self.first: list[Tensor] = []
        """What the first block has added, in each pass of the last step."""

    def run_blocks(self, plan: SequencePlan, hidden: Tensor, blocks: Blocks, probe: Probe) -> Tensor:
        number = len(self.first)
        states = [hidden, next(blocks)]
        self.first.append(states[1] - states[0])
        start = states[0 if self.whole else 1]
        if self.skip[number]:
            return start + self.rest[number]
        states += blocks
        self.rest[number] = states[-1] - start
        return states[-1]


class Alone:
    """A model in this process."""

    def __init__(self, path: str):
        recipe = {"path": path, "weight_dtype": "float32", "compute_dtype": "float32"}
        self._model = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)
        self.context = Scripted()

    def step(self, request: StepRequest, skip: Sequence[bool], whole: bool = False) -> Tensor:
        adapter, config = self._model.adapter, self._model.config
        out = torch.empty(adapter.output_shape(config, tuple(request.x.shape)))
        self.context.skip, self.context.whole, self.context.first = list(skip), whole, []
        with torch.no_grad():
            prepared = adapter.prepare(dict(request.conditioning))
            adapter.step(self._model.model, request.x, request.timestep, prepared, out, self.context)
        return out


SKIPPED = [
    *((name, kind, *plan) for name in MODELS for kind in KINDS for plan in PLANS if "dp_degree" not in plan[1]),
    *(
        (*case, *plan)
        for case in [
            ("hunyuan_video_15", "first_block"), ("cogvideox", "first_block"), ("cogvideox", "teacache"),
            ("mochi", "first_block"), ("mochi", "teacache"), ("ltxv", "first_block"), ("qwen_image", "first_block"),
            ("flux2", "first_block"),
        ]
        for plan in [("cpu,cpu", {"ring_degree": 2}), (FOUR, {})]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "devices", "degrees"), one_in(4, SKIPPED))
def test_skipped_steps_match_one_process_that_decides_alike(
    start_group: StartGroup,
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    devices: str,
    degrees: dict[str, int],
):
    # TeaCache knows CogVideoX by its size.
    monkeypatch.setitem(coefficients._COGVIDEOX, (2, 16, None), coefficients.COGVIDEOX_2B)
    model = (MODELS | OTHERS)[name]
    path = tiny_models.path(**model.checkpoint)
    alone = Alone(str(path))
    cache = CachedSampling(KINDS[kind](ALWAYS))
    skipped = []
    with loaded(start_group(devices), path, **degrees) as remote:
        for i, request in enumerate(trajectory(model, 6)):
            if i == 3:
                cache.restart()
            (result,) = remote.steps([request], cache=cache)
            passes = tallies(remote)[0]["passes"]
            skipped.append(tallies(remote)[0]["hits"] == passes)
            expected = alone.step(request, [skipped[-1]] * passes, whole=kind == "teacache")
            assert relative_difference(result, expected) <= PROCESS_TOLERANCE
            assert len(set(hits(remote))) == 1
            if skipped[-1]:
                (computed,) = remote.steps([request])
                assert relative_difference(result, computed) > 10 * SPLIT_TOLERANCE
    assert skipped == [False, True, True, False, True, True]


# --- one decision for all ranks of a sequence ---------------------------------------------------------------------


def half_changed(model: Model, amount: float) -> tuple[StepRequest, StepRequest]:
    """Two steps between which the latent's second half changes: what the last ranks own."""
    x, timestep, conditioning = model.inputs.make()
    moved = x.clone()
    half = x.shape[2] // 2
    moved[:, :, half:] += amount * torch.randn(moved[:, :, half:].shape, generator=torch.Generator().manual_seed(1))
    return StepRequest(x, timestep, conditioning), StepRequest(moved, timestep, conditioning)


@pytest.mark.parametrize(
    ("devices", "degrees"),
    [
        ("cpu,cpu", {}),
        ("cpu,cpu", {"ring_degree": 2}),
        (FOUR, {}),
        (FOUR, {"ulysses_degree": 2, "ring_degree": 2}),
        (FOUR, {"dp_degree": 2}),
    ],
)
def test_ranks_on_both_sides_of_the_threshold_decide_alike(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int]
):
    """Each rank alone would decide by its own tokens; they would then wait for each other forever."""
    model = Model({"depth": 2, "depth_single": 2}, Inputs(frames=4, batch=degrees.get("dp_degree", 1)))
    path = tiny_models.path(**model.checkpoint)
    before, after = half_changed(model, 0.5)
    alone = Alone(str(path))
    added = []
    for request in (before, after):
        alone.step(request, [False])
        added.append(alone.context.first[0])
    change, size = (added[1] - added[0]).abs().sum(2), added[0].abs().sum(2)
    half = change.shape[1] // 2
    low, high = (change[:, part].sum(1) / size[:, part].sum(1) for part in (slice(half), slice(half, None)))
    together = change.sum(1) / size.sum(1)
    assert low.max() < together.min() / 1.2 and together.max() < high.min() / 1.2, (
        "not the case that this test is about"
    )

    world = devices.count("cpu")
    with loaded(start_group(devices), path, **degrees) as remote:
        for threshold, expected in (((low.max() + together.min()) / 2, 0), ((together.max() + high.min()) / 2, 1)):
            cache = CachedSampling(first_block(threshold.item()))
            remote.steps([before], cache=cache)
            (result,) = remote.steps([after], cache=cache)
            assert hits(remote) == [expected] * world
            alone.step(before, [False])
            assert relative_difference(result, alone.step(after, [bool(expected)])) <= PROCESS_TOLERANCE


@pytest.mark.parametrize(
    ("devices", "degrees", "expected"),
    [
        ("cpu,cpu", {"dp_degree": 2}, [1, 0]),
        (FOUR, {"dp_degree": 2}, [1, 1, 0, 0]),
        (FOUR, {"dp_degree": 2, "ring_degree": 2}, [1, 1, 0, 0]),
        (FOUR, {"dp_degree": 4}, [1, 0, 0, 1]),
    ],
)
def test_groups_of_samples_decide_for_themselves(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int], expected: list[int]
):
    groups = degrees["dp_degree"]
    path = tiny_models.path(depth=2, depth_single=2)
    x, timestep, conditioning = Inputs(batch=groups).make()
    moved = x.clone()
    for group in range(groups):
        if not expected[group * len(expected) // groups]:
            moved[group] = -moved[group]
    with loaded(start_group(devices), path, **degrees) as remote:
        cache = CachedSampling(first_block(0.05))
        remote.steps([StepRequest(x, timestep, conditioning)], cache=cache)
        remote.steps([StepRequest(moved, timestep, conditioning)], cache=cache)
        assert hits(remote) == expected
        assert cache.report.hits == sum(expected) // (len(expected) // groups)


@pytest.mark.parametrize(
    ("devices", "degrees", "expected"),
    [
        ("cpu,cpu", {"cfg_degree": 2}, [1, 0]),
        (FOUR, {"cfg_degree": 2}, [1, 1, 0, 0]),
        (FOUR, {"cfg_degree": 2, "ring_degree": 2}, [1, 1, 0, 0]),
        ("cpu,cpu", {"cfg_degree": 1}, [1, 1]),
    ],
)
def test_cond_and_uncond_decide_for_themselves(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int], expected: list[int]
):
    cond = StepRequest(*Inputs(valid=(5,)).make(), "cond")
    uncond = StepRequest(*Inputs(text=3, seed=5).make(), "uncond")
    with loaded(start_group(devices), tiny_models.path(depth=2, depth_single=2), **degrees) as remote:
        cache = CachedSampling(first_block(0.05))
        remote.steps([cond, uncond], conditions=2, cache=cache)
        results = remote.steps([cond, replace(uncond, x=-uncond.x)], conditions=2, cache=cache)
        assert hits(remote) == expected
        (plain,) = remote.steps([replace(uncond, x=-uncond.x)])
        assert relative_difference(results[1], plain) <= SPLIT_TOLERANCE


def test_cond_and_uncond_in_one_batch_skip_only_together(start_group: StartGroup, tiny_models: TinyModels):
    """One of two samples has changed."""
    x, timestep, conditioning = Inputs(batch=2).make()
    moved = torch.cat([x[:1], -x[1:]])
    with loaded(start_group("cpu,cpu"), tiny_models.path(depth=2, depth_single=2)) as remote:
        cache = CachedSampling(first_block(0.05))
        decisions = []
        for latent in (x, x, moved, moved):
            remote.steps([StepRequest(latent, timestep, conditioning)], cache=cache)
            decisions.append(hits(remote))
    assert decisions == [[0, 0], [1, 1], [0, 0], [1, 1]]


# --- where it may not skip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_window_nothing_is_skipped_and_nothing_is_sent(
    start_group: StartGroup, tiny_models: TinyModels, kind: str
):
    model = MODELS["hunyuan_video"]
    request = trajectory(model, 1)[0]
    sigmas = [1.0, 0.9, 0.7, 0.6, 0.5, 0.2, 0.1]
    cache = CachedSampling(KINDS[kind](ALWAYS), first_sigma=0.7, last_sigma=0.2)
    with loaded(start_group("cpu,cpu"), tiny_models.path(**model.checkpoint)) as remote:
        (plain,) = remote.steps([request])
        collectives = [result["collectives"] for result in remote.last_step]
        decisions = []
        for sigma in sigmas:
            (result,) = remote.steps([request], cache=cache, sigma=sigma)
            decisions.append(hits(remote)[0])
            if not decisions[-1]:
                assert torch.equal(result, plain)
                assert [result["collectives"] for result in remote.last_step] == collectives
    assert decisions == [0, 0, 0, 1, 1, 0, 0]
    assert (cache.report.hits, cache.report.passes) == (2, 7)
    assert cache.report.seconds_saved > 0


def test_hits_in_a_row_are_limited(start_group: StartGroup, tiny_models: TinyModels):
    model = MODELS["hunyuan_video"]
    cache = CachedSampling(first_block(ALWAYS, max_consecutive_hits=2))
    decisions = []
    with loaded(start_group("cpu,cpu"), tiny_models.path(**model.checkpoint)) as remote:
        for request in trajectory(model, 8):
            remote.steps([request], cache=cache)
            decisions.append(hits(remote)[0])
    assert decisions == [0, 1, 1, 0, 1, 1, 0, 1]


# --- nothing is left of what came before --------------------------------------------------------------------------


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


def cancel() -> None:
    raise Cancelled


@pytest.fixture
def often_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    """These steps take milliseconds; Cancel is to come in the middle of them."""
    monkeypatch.setattr(group_module, "_SLICE_S", 0.0005)


def _doubled(name: str, stored: Stored) -> Stored:
    return Stored(stored.tensor * 2, stored.scale)


def test_what_is_remembered_ends_with_the_sampling_a_cancel_a_size_and_the_weights(
    start_group: StartGroup, tiny_models: TinyModels, often_polled: None
):
    model = MODELS["hunyuan_video"]
    request = trajectory(model, 1)[0]
    wider = StepRequest(*Inputs(frames=3, height=6, width=10, valid=(5,)).make())  # as many tokens
    with loaded(start_group("cpu,cpu"), tiny_models.path(**model.checkpoint)) as remote:
        cache = CachedSampling(first_block(ALWAYS))

        def decide(request: StepRequest, **options: Any) -> int:
            remote.steps([request], cache=cache, **options)
            return hits(remote)[0]

        assert [decide(request), decide(request)] == [0, 1]
        assert [decide(wider), decide(wider), decide(request), decide(request)] == [0, 1, 0, 1]
        number = cache.number
        with pytest.raises(Cancelled):
            decide(request, poll=cancel)
        assert cache.number != number, "a rank that is told late to forget would remember what others do not"
        assert [decide(request), decide(request)] == [0, 1]
        remote.replace_weights("double", ["final_layer.linear.weight"], _doubled)
        assert [decide(request), decide(request)] == [0, 1]
        remote.forget(cache)
        time.sleep(0.3)  # nobody waits for it
        assert [decide(request), decide(request)] == [0, 1]
        cache = CachedSampling(first_block(ALWAYS))
        assert [decide(request), decide(request)] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "degrees"),
    [
        pytest.param(FOUR, {}, marks=pytest.mark.extended),
        pytest.param(FOUR, {"ulysses_degree": 2, "ring_degree": 2}, marks=pytest.mark.extended),
        (FOUR, {"cfg_degree": 2}),
        ("cpu,cpu", {"cfg_degree": 2}),
    ],
)
@pytest.mark.parametrize("kind", ["first_block", pytest.param("teacache", marks=pytest.mark.extended)])
def test_hits_and_cancels_in_any_order_leave_no_rank_waiting(
    start_group: StartGroup,
    tiny_models: TinyModels,
    often_polled: None,
    kind: str,
    devices: str,
    degrees: dict[str, int],
):
    """200 steps. Every group of ranks would stop here for good when one rank decided differently."""
    chance = random.Random(3)
    model = Model({"depth": 2, "depth_single": 4}, Inputs(valid=(5,)))
    settings = KINDS[kind](0.3)
    cache = CachedSampling(settings)
    cancelled = skipped = computed = 0
    group = start_group(devices)
    pids = group.pids
    with loaded(group, tiny_models.path(**model.checkpoint), **degrees) as remote:
        x, timestep, conditioning = model.inputs.make()
        uncond = Inputs(text=3, seed=5).make()
        for _ in range(200):
            x = x + chance.choice((0.0, 0.02, 0.3)) * torch.randn(x.shape)
            timestep = timestep * chance.choice((1.0, 0.99, 0.9)) + 1
            countdown = chance.choice((0, 0, 0, 0, 1, 2, 4, 8, 16))

            def poll() -> None:
                nonlocal countdown
                countdown -= 1
                if countdown == 0:
                    raise Cancelled

            requests = [StepRequest(x, timestep, conditioning, "cond"), StepRequest(x, timestep, uncond[2], "uncond")]
            try:
                remote.steps(requests, conditions=2, cache=cache, poll=poll)
            except Cancelled:
                cancelled += 1
                continue
            skipped += sum(hits(remote))
            computed += sum(tally["passes"] - tally["hits"] for tally in tallies(remote))
            if chance.random() < 0.05:
                remote.forget(cache)
                cache = CachedSampling(settings)
    assert group.pids == pids
    assert min(cancelled, skipped, computed) > 10


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.extended
@pytest.mark.cpu_ranks("processor time")
@pytest.mark.parametrize("devices", [pytest.param("cpu", marks=pytest.mark.extended), "cpu,cpu"])
def test_a_hit_costs_no_more_than_the_first_block(start_group: StartGroup, tiny_models: TinyModels, devices: str):
    """Against a network that has only this block, before which and behind which everything is the same."""
    group = start_group(devices)
    request = StepRequest(*Inputs(frames=1, height=48, width=48).make())
    quiet = QuietRounds(group.pids)
    with (
        loaded(group, tiny_models.path(heads=4, depth=1, depth_single=0)) as single,
        loaded(group, tiny_models.path(heads=4, depth=4, depth_single=4)) as deep,
    ):
        cache = CachedSampling(first_block(ALWAYS))

        def seconds(remote: RemoteModel, cache: CachedSampling | None = None) -> float:
            remote.steps([request], cache=cache)
            return max(result["seconds"] for result in remote.last_step)

        def interleaved() -> float:
            """A hit over the first block."""
            pairs = [(seconds(deep, cache), seconds(single)) for _ in range(5)]
            hit, first = (median(column) for column in zip(*pairs, strict=True))
            return hit / first

        whole = seconds(deep, cache) / seconds(single)
        interleaved()
        phases: list[float] = []
        while not phases or (phases[-1] > 1.15 and len(phases) < 5):  # others may use this machine
            phases.append(median(ratio for _ in range(5) for ratio, _ in quiet.run([interleaved])))
        report = cache.report
    print(
        f"{devices}: a hit is {', '.join(f'{ratio:.3f}' for ratio in phases)} × the first block, a miss {whole:.1f} ×"
    )
    assert report.hits == report.passes - 1
    assert min(phases) <= 1.15
    assert whole > 3
