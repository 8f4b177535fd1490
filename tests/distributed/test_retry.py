"""`on_failure: retry`: what is lost with a worker is done again by fresh ones, once, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.errors import WorkerDiedError, WorkerOutOfMemoryError
from parallel.host import status
from parallel.host.cached_sampling import CachedSampling
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import Operation, RunNetwork, Sample
from tests.distributed.events import heard
from tests.distributed.faults import Faults
from tests.distributed.faulty_boot import IS_KILLED, OUT_OF_MEMORY
from tests.distributed.test_sampling import SETTINGS, Sampling, Setting
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of, step

pytestmark = pytest.mark.slow

TWO = "cpu,cpu"
SMALL = Inputs(valid=(5,))


@pytest.fixture
def retried() -> Iterator[list[status.Event]]:
    """What users are told."""
    with heard(status.RETRIED) as events:
        yield events


class Case:
    """A model that is tried again, and the calls that its groups get."""

    def __init__(self, tiny_models: TinyModels, faults: Faults, setting: Setting, on_failure: str = "retry"):
        faults.clear()
        self._faults = faults
        self.model = RemoteModel(recipe_of(setting.model.path(tiny_models), TWO, on_failure=on_failure))
        self.samples: list[Sample] = []
        self.restored = 0
        self._load()

    def _load(self) -> None:
        self.model.weights.ensure_loaded()
        group = self.model.weights.group
        assert group is not None
        call = group.call

        def spied(message: Operation, **options: Any) -> Any:
            if isinstance(message, Sample):
                self.samples.append(message)
            return call(message, **options)

        group.call = spied  # type: ignore[method-assign]

    def restore(self) -> None:
        self.restored += 1
        self._load()

    def restore_mended(self) -> None:
        """Fresh workers that nothing happens to."""
        self._faults.clear()
        self.restore()

    def passes(self) -> list[int]:
        """Of each sampling message, how often it is to run the network."""
        return [sum(isinstance(each, RunNetwork) for each in message.program) for message in self.samples]


@pytest.fixture
def case(tiny_models: TinyModels, faults: Faults) -> Iterator[Case]:
    made = Case(tiny_models, faults, SETTINGS["euler"])
    yield made
    faults.clear()
    made.model.weights.unload()


def test_a_step_is_run_again_with_the_same_bits(case: Case, faults: Faults, retried: list[status.Event]) -> None:
    right = step(case.model, SMALL).clone()
    faults.order(IS_KILLED, [1], count=3)
    assert torch.equal(case.model.steps([SMALL.make()], restore=case.restore_mended)[0], right)
    assert case.restored == 1
    text = retried[0].text
    assert (
        len(retried) == 1 and "fresh workers repeat the step" in text and "worker rank 1" in text and "SIGKILL" in text
    )


@pytest.mark.parametrize(
    "name", ["euler", *(pytest.param(each, marks=pytest.mark.extended) for each in ("guided", "together"))]
)
def test_a_sampling_goes_on_behind_the_last_finished_step_with_the_same_bits(
    name: str, tiny_models: TinyModels, faults: Faults, retried: list[status.Event]
) -> None:
    """Multistep samplers keep several latents; heun has two passes in a step."""
    setting = replace(SETTINGS[name], steps=6)
    case = Case(tiny_models, faults, setting)
    program = Sampling(setting).record()
    right, _ = case.model.sample(program, restore=case.restore)
    passes = len(program.networks)
    faults.order(IS_KILLED, [1], place="before pass", count=4)
    shown: list[int] = []
    result, report = case.model.sample(
        program, restore=case.restore_mended, on_step=lambda step, *_: shown.append(step)
    )
    assert torch.equal(result, right)
    assert report.resumed == case.restored == len(retried) == 1
    assert report.passes == sum(len(network.passes) for network in program.networks)
    of_a_step = -(-passes // setting.steps)
    assert case.passes()[:2] == [passes, passes] and passes - 3 <= case.passes()[2] <= passes - 3 + of_a_step
    assert shown[-1] == setting.steps - 1 and shown == sorted(set(shown))
    case.model.weights.unload()


def test_a_cache_starts_cold_and_says_so(case: Case, faults: Faults, retried: list[status.Event]) -> None:
    cache = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=1e9))
    case.model.sample(Sampling(SETTINGS["euler"]).record(), cache=cache)
    faults.order(IS_KILLED, [0], place="before pass", count=3)
    case.model.sample(Sampling(SETTINGS["euler"]).record(), cache=cache, restore=case.restore_mended)
    assert "with an empty First Block Cache (SP)" in retried[0].text


@pytest.mark.parametrize("what", ["step", "sampling"])
def test_what_fails_again_ends_the_prompt(case: Case, faults: Faults, retried: list[status.Event], what: str) -> None:
    faults.order(IS_KILLED, [1], place="before block", count=2)
    with pytest.raises(WorkerDiedError, match="rank 1"):
        if what == "step":
            case.model.steps([SMALL.make()], restore=case.restore)
        else:
            case.model.sample(Sampling(SETTINGS["euler"]).record(), restore=case.restore)
    assert case.restored == len(retried) == 1


def test_memory_that_is_short_would_be_so_again(case: Case, faults: Faults, retried: list[status.Event]) -> None:
    faults.order(OUT_OF_MEMORY, [1])
    with pytest.raises(WorkerOutOfMemoryError):
        case.model.steps([SMALL.make()], restore=case.restore)
    assert case.restored == 0 and not retried


def test_without_the_wish_an_error_is_an_error(
    tiny_models: TinyModels, faults: Faults, retried: list[status.Event]
) -> None:
    case = Case(tiny_models, faults, SETTINGS["euler"], on_failure="error")
    faults.order(IS_KILLED, [1])
    with pytest.raises(WorkerDiedError):
        case.model.steps([SMALL.make()], restore=case.restore)
    assert case.restored == 0 and not retried
