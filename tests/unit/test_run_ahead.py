"""How far host code runs ahead of a CUDA device: against a device and a clock that are stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from parallel.wire.control import ControlPage
from parallel.worker.run_ahead import MOST, QUEUED_S, Paces, RunAhead, blocks_within

KERNELS = 10
"""Of a block."""


class Device:
    """A queue of kernels. `now` is the host's clock, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.idle_at = 0.0

    def launch_block(self, seconds: float, launching: float) -> None:
        for _ in range(KERNELS):
            self.now += launching / KERNELS
            self.idle_at = max(self.idle_at, self.now) + seconds / KERNELS


class Event:
    def __init__(self, device: Device):
        self._device = device

    def record(self) -> None:
        self.at = max(self._device.idle_at, self._device.now)

    def synchronize(self) -> None:
        self._device.now = max(self._device.now, self.at)

    def elapsed_time(self, later: Event) -> float:
        return (later.at - self.at) * 1000


class Stopped(Exception):
    pass


def alone(pace: float) -> float:
    return pace


def run_pass(
    paces: Paces,
    *,
    seconds: float,
    launching: float,
    blocks: int = 40,
    agree: Callable[[float], float] = alone,
    should_stop: Callable[[int, int, float], bool] = lambda block, run_ahead, now: False,
) -> tuple[float, int]:
    """Seconds until the device is done, and the run-ahead.

    Args:
        should_stop: called before each block with its number, the run-ahead and the time.
    """
    device = Device()
    run_ahead = RunAhead(paces, agree, partial(Event, device))
    blocks_ahead = -1
    for block in range(blocks):
        blocks_ahead = run_ahead.enter("a split")
        if should_stop(block, blocks_ahead, device.now):
            return device.idle_at, blocks_ahead
        device.launch_block(seconds, launching)
    device.now = device.idle_at
    run_ahead.finish()
    return device.now, blocks_ahead


@pytest.fixture(scope="module")
def page() -> Iterator[ControlPage]:
    page = ControlPage.create()
    yield page
    page.close()


@pytest.mark.parametrize("seconds", [0.6, 0.2, 2 * QUEUED_S])
def test_with_long_blocks_cancel_takes_effect_within_two_blocks(page: ControlPage, seconds: float):
    paces: Paces = {}
    run_pass(paces, seconds=seconds, launching=0.004)
    for tenths in range(0, 300, 7):
        asked = seconds * tenths / 10
        page.reset(1)

        def should_stop(block: int, run_ahead: int, now: float, asked: float = asked) -> bool:
            if now >= asked:
                page.request_cancel()
            return page.should_stop(block, group=0, leader=True, run_ahead=run_ahead)

        ended, _ = run_pass(paces, seconds=seconds, launching=0.004, should_stop=should_stop)
        assert ended - asked <= 2 * seconds * 1.02


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.03])
def test_what_is_queued_is_bounded_by_time(seconds: float):
    paces: Paces = {}
    run_pass(paces, seconds=seconds, launching=seconds / 10)
    _, run_ahead = run_pass(paces, seconds=seconds, launching=seconds / 10)
    assert 1 <= run_ahead <= MOST and run_ahead * seconds <= QUEUED_S * 1.01


def test_with_short_blocks_launches_overlap():
    """The first pass waits for each block, and later ones launch while the device computes."""
    paces: Paces = {}
    (first, none), (second, most) = (run_pass(paces, seconds=0.001, launching=0.0008) for _ in range(2))
    assert (none, most) == (0, MOST)
    assert second <= 1.05 * 40 * 0.001
    assert first >= 1.05 * second


def test_a_change_of_pace_is_followed():
    paces: Paces = {}
    run_pass(paces, seconds=0.001, launching=0.0001)
    assert run_pass(paces, seconds=1.0, launching=0.0001)[1] == MOST
    assert run_pass(paces, seconds=1.0, launching=0.0001)[1] == 0


def test_ranks_agree_on_the_slowest_pace():
    """A rank whose pace is not known, and one that is slower, hold the others back."""
    for paces in ([0.001, 0.02], [0.001, math.inf], [0.001, 0.001]):
        tables: list[Paces] = [{} if pace == math.inf else {"a split": pace} for pace in paces]
        found = {run_pass(t, seconds=0.001, launching=0.0001, agree=lambda _, p=paces: max(p))[1] for t in tables}
        assert found == {blocks_within(max(paces))}


def test_they_agree_once_per_pass():
    asked: list[float] = []

    def agree(pace: float) -> float:
        asked.append(pace)
        return pace

    paces: Paces = {}
    for number in (1, 2):
        run_pass(paces, seconds=0.01, launching=0.001, agree=agree)
        assert len(asked) == number


def test_a_pass_of_one_block_says_nothing_of_the_pace():
    """A cache has skipped the others."""
    paces: Paces = {"a split": 0.01}
    run_pass(paces, seconds=1.0, launching=0.001, blocks=1)
    assert paces == {"a split": 0.01}


@pytest.mark.parametrize(
    ("pace", "blocks"), [(math.inf, 0), (1.0, 0), (QUEUED_S, 1), (QUEUED_S / 2, 2), (1e-9, MOST), (0.0, MOST)]
)
def test_blocks_within_the_time(pace: float, blocks: int):
    assert blocks_within(pace) == blocks
