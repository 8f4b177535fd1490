"""A whole sampling in the workers against the same one step by step on one process."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.errors import WorkerDiedError
from parallel.host import calls
from parallel.host.cached_sampling import CachedSampling
from parallel.host.remote_model import RemoteModel
from parallel.sampling.program import Program
from parallel.sampling.recording import Recorder
from parallel.sampling.step_request import StepRequest
from tests.distributed.devices import kind
from tests.distributed.tiny_models import FLUX, WAN, Inputs, Model, StartGroup, TinyModels, loaded, relative_difference

FOUR = "cpu,cpu,cpu,cpu"
TOLERANCE = kind().split

Denoiser = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor, int], None]
Solver = Callable[[Denoiser, Tensor, Sequence[float], Callback], Tensor]


# --- solvers, as ComfyUI's are written ----------------------------------------------------------------------------


def euler(model: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback) -> Tensor:
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        callback(i, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def with_memory_and_noise(model: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback) -> Tensor:
    """Second order from what the step before has said, and fresh noise at every step."""
    generator = torch.Generator().manual_seed(5)
    before = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        callback(i, denoised, x, len(sigmas) - 1)
        guess = denoised if before is None else 1.5 * denoised - 0.5 * before
        noise = torch.randn(x.shape, generator=generator)
        ratio = following / sigma
        x = ratio * x + (1 - ratio) * guess
        if following:
            x += 0.1 * following * noise
        before = denoised
    return x


def heun(model: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback) -> Tensor:
    """Two passes for a step."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        callback(i, denoised, x, len(sigmas) - 1)
        slope = (x - denoised) / sigma
        if following:
            there = x + slope * (following - sigma)
            slope = (slope + (there - model(there, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


# --- what is sampled ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A flow model, guided, with a mask or without."""

    model: Model
    solver: Solver
    negative: Inputs | None = None
    """Of the second condition; its latent is not used."""
    together: bool = False
    """Both conditions in one call, as ComfyUI does where their shapes agree."""
    masked: bool = False
    concat: int = 0
    """Channels of x that are not the latent's."""
    steps: int = 4


ODD = Inputs(frames=3, height=10, width=6, valid=(5,))
PICTURE = Inputs(FLUX, frames=1, height=10, width=6, batch=2)
CONCAT = Inputs(WAN, channels=36, frames=3, width=6)
SETTINGS = {
    "euler": Setting(Model(ODD), euler),
    "guided": Setting(Model(ODD), with_memory_and_noise, replace(ODD, valid=(8,), seed=1), masked=True),
    "together": Setting(Model(Inputs(batch=2)), heun, Inputs(batch=2, seed=1), together=True, masked=True),
    "flux": Setting(Model(PICTURE), with_memory_and_noise, replace(PICTURE, seed=1)),
    "wan_i2v": Setting(Model(CONCAT, {"in_channels": 36}), heun, replace(CONCAT, text=7, seed=1), concat=20),
}

RUNS: list[tuple[str, str, dict[str, int]]] = [
    ("guided", "cpu", {}),
    ("guided", "cpu,cpu", {}),
    ("guided", "cpu,cpu", {"cfg_degree": 2}),
    ("together", "cpu,cpu", {"cfg_degree": 2}),
    ("together", "cpu,cpu", {"dp_degree": 2}),
    ("flux", "cpu,cpu", {}),
    ("wan_i2v", "cpu,cpu", {}),
    ("euler", "cpu*3,cpu,cpu", {"ring_degree": 3}),
    ("guided", "cpu*3,cpu,cpu", {}),
    ("wan_i2v", FOUR, {"ulysses_degree": 2, "ring_degree": 2}),
    ("guided", FOUR, {"cfg_degree": 2, "ulysses_degree": 2}),
    ("flux", FOUR, {"cfg_degree": 2, "dp_degree": 2}),
]


class Sampling:
    """The code of a sampling, to be run with the network's predictions or with a recorder's."""

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32):
        self.setting, self.dtype = setting, dtype
        self.conditions = [
            replace(inputs, dtype=dtype).make() for inputs in (setting.model.inputs, setting.negative) if inputs
        ]
        x = self.conditions[0].x
        self.largest = float(self.conditions[0].timestep.max())
        self.noise, self.beside = x[:, : x.shape[1] - setting.concat].float(), x[:, x.shape[1] - setting.concat :]
        generator = torch.Generator().manual_seed(7)
        self.image = torch.randn(self.noise.shape, generator=generator)
        self.mask = (torch.rand(self.noise.shape[2:], generator=generator) > 0.3).float().expand(self.noise.shape)

    @property
    def sigmas(self) -> list[float]:
        return torch.linspace(1, 0, self.setting.steps + 1).tolist()

    def run(self, predict: Callable[..., Tensor], noise: Tensor, callback: Callback) -> Tensor:
        def network(x: Tensor, sigma: float, condition: StepRequest, label: str) -> Tensor:
            x = x.to(self.dtype)
            if self.setting.concat:
                x = torch.cat([x, self.beside], dim=1)
            timestep = torch.full((len(x),), self.largest * sigma)
            return predict(replace(condition, x=x, timestep=timestep, label=label), sigma).float()

        def model(x: Tensor, sigma: float) -> Tensor:
            if self.setting.masked:
                x = x * self.mask + (sigma * noise + (1 - sigma) * self.image) * (1 - self.mask)
            if self.setting.together:
                first, second = self.conditions
                both = {
                    name: torch.cat([first.conditioning[name], second.conditioning[name]])
                    for name in first.conditioning
                }
                given, other = network(torch.cat([x, x]), sigma, replace(first, conditioning=both), "0 1").chunk(2)
                velocity = other + (given - other) * 3.0
            else:
                all_of = [network(x, sigma, each, str(i)) for i, each in enumerate(self.conditions)]
                velocity = all_of[0] if len(all_of) == 1 else all_of[1] + (all_of[0] - all_of[1]) * 3.0
            denoised = x - velocity * sigma
            return denoised * self.mask + self.image * (1 - self.mask) if self.setting.masked else denoised

        return self.setting.solver(model, noise * self.sigmas[0], self.sigmas, callback)

    def record(self) -> Program:
        recorder = Recorder(self.noise.shape, torch.device("cpu"), most_bytes=2**30)

        def predict(request: StepRequest, sigma: float) -> Tensor:
            shape = (len(request.x), *self.noise.shape[1:])
            return recorder.network(request, shape, conditions=frozenset(map(int, request.label.split())), sigma=sigma)

        return recorder.finish(self.run(predict, recorder.given(self.noise), recorder.report))

    def stepwise(self, remote: RemoteModel, cache: CachedSampling | None = None) -> tuple[Tensor, list[Tensor]]:
        """The result, and the denoised latents that the callback is shown."""
        shown: list[Tensor] = []

        def predict(request: StepRequest, sigma: float) -> Tensor:
            return remote.steps([request], cache=cache, sigma=sigma)[0].clone()

        def callback(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
            shown.append(denoised.clone())

        return self.run(predict, self.noise, callback), shown


@pytest.fixture(scope="module")
def expected(start_group: StartGroup, tiny_models: TinyModels) -> Callable[[str], tuple[Tensor, list[Tensor]]]:
    """Each setting step by step on one process."""
    known: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def get(name: str) -> tuple[Tensor, list[Tensor]]:
        if name not in known:
            setting = SETTINGS[name]
            with loaded(start_group("cpu"), setting.model.path(tiny_models)) as remote:
                known[name] = Sampling(setting).stepwise(remote)
        return known[name]

    return get


@pytest.mark.parametrize(("name", "devices", "degrees"), RUNS)
def test_the_same_result_after_one_message(
    start_group: StartGroup,
    tiny_models: TinyModels,
    expected: Callable[[str], tuple[Tensor, list[Tensor]]],
    name: str,
    devices: str,
    degrees: dict[str, int],
):
    setting = SETTINGS[name]
    right, right_shown = expected(name)
    shown: dict[int, Tensor] = {}

    def on_step(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        assert steps == setting.steps
        shown[step] = denoised

    with loaded(start_group(devices), setting.model.path(tiny_models), **degrees) as remote:
        group = remote.weights.group
        assert group is not None
        for _ in range(2):  # the second time in the same memory
            sent = group.messages
            shown.clear()
            result, report = remote.sample(Sampling(setting).record(), on_step=on_step)
            assert group.messages - sent == report.messages == 1
            assert relative_difference(result, right) <= TOLERANCE
            assert report.previews >= len(shown) > 0
            for rank in remote.last_step:
                assert 0 <= rank["exposed_s"] < rank["seconds"]
                assert (rank["exposed_s"] > 0) == (group.layout.world_size > 1), "ranks wait between two passes"
    assert list(shown) == sorted(shown) and setting.steps - 1 in shown
    for step, denoised in shown.items():
        assert relative_difference(denoised, right_shown[step]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("interval_s", "most"), [(0.0, 40), (1000.0, 2), (None, 0)])
def test_latents_travel_only_for_previews_that_are_due(
    start_group: StartGroup, tiny_models: TinyModels, interval_s: float | None, most: int
):
    """None: nobody looks. Progress goes on all the same."""
    setting = replace(SETTINGS["euler"], steps=40)
    shown: list[int] = []
    done: list[int] = []

    def on_step(step: int, *_: Any) -> None:
        shown.append(step)
        done.append(step + 1)

    with loaded(start_group("cpu,cpu"), setting.model.path(tiny_models)) as remote:
        assert remote.weights.group is not None
        _, report = remote.sample(
            Sampling(setting).record(),
            on_step=None if interval_s is None else on_step,
            interval_s=interval_s or 0.0,
            on_progress=lambda now, total: done.append(now),
        )
    assert len(shown) <= report.previews <= most, "the last one may come before another one has been looked at"
    if interval_s is not None:
        assert shown[-1] == setting.steps - 1
    if interval_s:
        assert shown[0] < 5 and len(shown) == 2, "the first step and the last"
    else:
        assert interval_s is None or len(shown) > 3
    assert done == sorted(set(done)) and done[-1] == setting.steps
    assert len(done) > 5, "progress waited for previews"


@pytest.mark.slow
def test_two_previews_are_as_far_apart_as_asked(start_group: StartGroup, tiny_models: TinyModels):
    setting = replace(SETTINGS["euler"], steps=60)
    looked: list[float] = []
    with loaded(start_group("cpu,cpu"), setting.model.path(tiny_models)) as remote:
        program = Sampling(setting).record()
        _, quick = remote.sample(program)
        interval = quick.seconds / 10
        remote.sample(program, on_step=lambda *_: looked.append(time.monotonic()), interval_s=interval)
    between = [later - earlier for earlier, later in pairwise(looked[:-1])]  # the last one is not waited for
    assert between and sum(between) / len(between) >= 0.9 * interval


def test_bf16(start_group: StartGroup, tiny_models: TinyModels):
    """The latent stays in fp32, as in ComfyUI; the network gets and gives bf16."""
    sampling = Sampling(SETTINGS["wan_i2v"], torch.bfloat16)
    path = sampling.setting.model.path(tiny_models)
    with loaded(start_group("cpu,cpu"), path, torch.bfloat16) as remote:
        right, _ = sampling.stepwise(remote)
        result, _ = remote.sample(sampling.record())
    assert result.dtype == torch.float32
    assert not torch.equal(result.bfloat16().float(), result)
    assert relative_difference(result, right) <= 5e-3


def test_conditions_run_side_by_side(start_group: StartGroup, tiny_models: TinyModels):
    setting = SETTINGS["guided"]
    program = Sampling(setting).record()
    assert [len(network.passes) for network in program.networks] == [2] * setting.steps
    with loaded(start_group("cpu,cpu"), setting.model.path(tiny_models), cfg_degree=2) as remote:
        remote.sample(program)
        assert [result["collectives"] for result in remote.last_step] == [0, 0], "no rank has a sequence to share"


def test_a_cache_skips_and_counts_as_step_by_step(start_group: StartGroup, tiny_models: TinyModels):
    setting = replace(SETTINGS["euler"], steps=6)
    sampling = Sampling(setting)
    settings = FirstBlockCacheSettings(residual_diff_threshold=1e9, max_consecutive_hits=2)
    with loaded(start_group("cpu,cpu"), setting.model.path(tiny_models)) as remote:
        there, here = (CachedSampling(settings, first_sigma=0.9) for _ in range(2))
        right, _ = sampling.stepwise(remote, there)
        result, _ = remote.sample(sampling.record(), cache=here)
        assert relative_difference(result, right) <= TOLERANCE
        assert (here.report.hits, here.report.passes) == (there.report.hits, there.report.passes)
        assert here.report.hits == 3, "of the five steps in its window, but the first, and one after two"
        assert here.report.seconds_saved > 0


# --- stopped ------------------------------------------------------------------------------------------------------


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "degrees"), [("cpu,cpu", {}), ("cpu,cpu", {"cfg_degree": 2}), (FOUR, {"cfg_degree": 2})]
)
def test_cancels_at_any_time_leave_no_rank_waiting(
    start_group: StartGroup,
    tiny_models: TinyModels,
    expected: Callable[[str], tuple[Tensor, list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    devices: str,
    degrees: dict[str, int],
):
    monkeypatch.setattr(calls, "_SLICE_S", 0.0005)
    right, _ = expected("guided")
    setting = SETTINGS["guided"]
    times = random.Random(0)
    with loaded(start_group(devices), setting.model.path(tiny_models), **degrees) as remote:
        program = Sampling(setting).record()
        began = time.monotonic()
        remote.sample(program)
        lasts = time.monotonic() - began
        group = remote.weights.group
        assert group is not None
        pids = list(group.pids)
        cancelled = 0
        for _ in range(8):
            until = time.monotonic() + times.uniform(0, lasts)

            def poll(until: float = until) -> None:
                if time.monotonic() > until:
                    raise Cancelled

            try:
                remote.sample(program, poll=poll)
            except Cancelled:
                cancelled += 1
        assert cancelled >= 3
        assert relative_difference(remote.sample(program)[0], right) <= TOLERANCE
        assert group.pids == pids


def test_a_callback_that_raises_stops_the_workers(start_group: StartGroup, tiny_models: TinyModels):
    """ComfyUI's progress bar raises at Cancel, too."""
    sampling = Sampling(replace(SETTINGS["euler"], steps=1000))
    with loaded(start_group("cpu,cpu"), SETTINGS["euler"].model.path(tiny_models)) as remote:
        program, short = sampling.record(), Sampling(SETTINGS["euler"]).record()
        right, _ = remote.sample(short)
        reached: list[int] = []

        def raising(step: int, *_: Any) -> None:
            reached.append(step)
            raise Cancelled

        with pytest.raises(Cancelled):
            remote.sample(program, on_step=raising)
        assert torch.equal(remote.sample(short)[0], right)
        assert len(reached) == 1 and reached[0] < 990


def test_a_killed_worker_ends_the_sampling_by_name(start_group: StartGroup, tiny_models: TinyModels):
    sampling = Sampling(replace(SETTINGS["euler"], steps=400))
    with loaded(start_group("cpu,cpu"), SETTINGS["euler"].model.path(tiny_models)) as remote:
        group = remote.weights.group
        assert group is not None

        def kill(*_: Any) -> None:
            os.kill(group.pids[1], signal.SIGKILL)

        with pytest.raises(WorkerDiedError, match=r"rank 1.*'sample'"):
            remote.sample(sampling.record(), on_step=kill)
        assert not remote.weights.loaded


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_noise_of_a_sampling_takes_no_memory_after_it(start_group: StartGroup, tiny_models: TinyModels):
    setting = replace(SETTINGS["guided"], steps=40)
    with loaded(start_group("cpu,cpu"), setting.model.path(tiny_models)) as remote:
        group = remote.weights.group
        assert group is not None
        segment = None
        most = 0

        def look(*_: Any) -> None:
            nonlocal segment, most
            segment = group.memory.segment("sampling", 0)
            most = max(most, os.fstat(segment.fileno()).st_blocks * 512)

        program = Sampling(setting).record()
        noise = sum(tensor.nbytes for tensor in program.constants.values())
        remote.sample(program, on_step=look)
        assert segment is not None
        assert most > noise > 39 * 4 * 16 * 3 * 10 * 6
        assert os.fstat(segment.fileno()).st_blocks * 512 < noise / 10
