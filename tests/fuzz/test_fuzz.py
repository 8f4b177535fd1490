"""A few thousand damaged inputs in each run of the tests; `python -m tests.fuzz.wire` and `.headers` run more."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.fuzz import headers, wire
from tests.fuzz.runs import Costs, run

CASES = 2000


@pytest.mark.parametrize("kind", [wire, headers], ids=lambda kind: kind.__name__.rpartition(".")[2])
def test_damaged_input_is_accepted_or_refused_as_documented(kind: ModuleType) -> None:
    outcome = run(kind.read_damaged, range(CASES), seed=0)
    assert not outcome.failures, outcome.failures[0]
    assert 0.05 < outcome.accepted / CASES < 0.6, f"{outcome}: the damage is too small, or too large, to find anything"
    assert outcome.slowest < 1
    assert outcome.memory < 100 << 20


@pytest.mark.parametrize("kind", [wire, headers], ids=lambda kind: kind.__name__.rpartition(".")[2])
def test_a_case_can_be_run_again_alone(kind: ModuleType) -> None:
    alone = [run(kind.read_damaged, range(case, case + 1), seed=7).accepted for case in range(100)]
    assert sum(alone) == run(kind.read_damaged, range(100), seed=7).accepted


def test_an_exception_that_is_no_refusal_names_its_case() -> None:
    outcome = run(failing(lambda random_: random_.random() < 0.1), range(100), seed=3)
    assert len(outcome.failures) > 1
    first = outcome.failures[0]
    assert "ZeroDivisionError" in first
    again = int(first.split("--first ")[1].split()[0])
    assert first.startswith(f"--seed 3 --first {again} --cases 1")
    assert run(failing(lambda random_: random_.random() < 0.1), range(again, again + 1), seed=3).failures == [first]


def failing(when: Callable[[random.Random], bool]) -> Callable[[random.Random], bool]:
    def read(random_: random.Random) -> bool:
        return bool(1 / (not when(random_)))

    return read


def test_memory_and_time_are_measured() -> None:
    with Costs() as costs:
        assert len(b"x" * (64 << 20)) == 64 << 20
    assert 60 << 20 < costs.memory < 80 << 20
    assert costs.seconds > 0
