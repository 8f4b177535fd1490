"""When silent ranks count as stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.compilation.settings import CompileSettings
from parallel.degrees import Degrees
from parallel.host import pace
from parallel.host.pace import FACTOR, FIRST_START_S, HALTED_S, LONGEST_S, SHORTEST_S, Pace, Watch, work_of
from parallel.host.process_state import ENDED, in_words, state
from parallel.wire.messages import Conditioning, FreeMemory, Pass, Request, RunNetwork, Sample, Step, Weights
from parallel.wire.shared import TensorRef

NOTHING = Conditioning(put={}, drop=[])


def request(*shape: int) -> Request:
    place = TensorRef("step", 0, shape, "float32")
    return Request(x=place, timestep=place, out=place, conditioning={}, label="", arguments=None, parts=[])


STEP = Step(
    model="model-1",
    degrees=Degrees(ulysses=2),
    requests=[request(1, 16, 2, 8, 8)],
    conditioning=NOTHING,
    cache=None,
    compile=None,
)


def network(passes: int) -> RunNetwork:
    each = Pass(request=request(1, 16, 2, 8, 8), latents=[0], results=[1])
    return RunNetwork(passes=[each] * passes, degrees=0, active=False)


SAMPLE = Sample(
    model="model-1", degrees=[Degrees(ulysses=2)], size=2048, constants={}, program=[network(1)], free=[[]], result=[],
    out=TensorRef("sampling", 0, (1,), "float32"), previews=None, kept=None,
    conditioning=NOTHING, cache=None, compile=None,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def worker(rank: int, pid: int | None = None) -> Any:
    return SimpleNamespace(rank=rank, process=SimpleNamespace(pid=pid or os.getpid()))


def test_work_that_was_not_measured_gets_the_longest_patience() -> None:
    assert Pace().patience(work_of(STEP)) == LONGEST_S == 600


@pytest.mark.parametrize(
    ("silences", "patience"),
    [((0.01,), SHORTEST_S), ((20.0, 1.0), 20 * FACTOR), ((1000.0,), LONGEST_S)],
)
def test_patience_follows_the_longest_silence_within_bounds(silences: tuple[float, ...], patience: float) -> None:
    measured = Pace()
    for silence in silences:
        measured.measured(work_of(STEP), silence)
    assert measured.patience(work_of(STEP)) == patience
    assert SHORTEST_S >= 30


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "model-2"},
        {"degrees": Degrees(ring=2)},
        {"requests": [request(1, 16, 33, 90, 160)]},
        {"requests": STEP.requests * 2},
        {"compile": CompileSettings()},
    ],
)
def test_other_work_is_not_measured_against_this_one(changed: dict[str, Any]) -> None:
    measured = Pace()
    measured.measured(work_of(STEP), 0.01)
    assert measured.patience(work_of(replace(STEP, **changed))) == LONGEST_S


@pytest.mark.parametrize(("name", "value"), [("size", 4096), ("program", [network(2)])])
def test_samplings_of_other_sizes_are_other_work(name: str, value: Any) -> None:
    assert work_of(SAMPLE) != work_of(replace(SAMPLE, **{name: value}))


def test_reading_files_is_not_measured() -> None:
    measured = Pace()
    for message in (Weights(model="model-1"), FreeMemory()):
        assert work_of(message) is None
        measured.measured(work_of(message), 0.01)
        assert measured.patience(work_of(message)) == LONGEST_S


def test_not_every_kind_of_work_is_remembered_for_ever() -> None:
    measured = Pace()
    for number in range(1000):
        measured.measured(number, 0.01)
    assert measured.patience(999) == SHORTEST_S
    assert measured.patience(0) == LONGEST_S


def wait(watch: Watch, clock: Clock, seconds: float, silent: list[Any], beats: tuple[int, ...]) -> Any:
    """Looks twice a second, until something is stuck."""
    for _ in range(round(seconds * 2)):
        clock.now += 0.5
        if (stuck := watch.look(silent, beats)) is not None:
            return stuck
    return None


def test_a_silent_rank_is_stuck_after_the_patience_and_its_waiting_peers_are_not() -> None:
    clock = Clock()
    watch = Watch(lambda: 100.0, clock)
    ranks = [worker(0), worker(1), worker(2)]
    assert wait(watch, clock, 50, ranks, (1, 1, 1)) is None
    assert wait(watch, clock, 99, ranks, (5, 4, 5)) is None
    stuck = wait(watch, clock, 10, ranks, (5, 4, 5))
    assert [each.rank for each in stuck.workers] == [1]
    assert "no sign of life for 100 s" in stuck.reason
    assert "state" in stuck.reason
    assert watch.longest == pytest.approx(50, abs=1)


def test_an_answer_is_a_sign_of_life() -> None:
    clock = Clock()
    watch = Watch(lambda: 100.0, clock)
    assert wait(watch, clock, 90, [worker(0), worker(1)], (1, 1)) is None
    assert wait(watch, clock, 90, [worker(1)], (1, 1)) is None
    assert wait(watch, clock, 90, [worker(1)], (1, 1)) is not None


def test_time_in_which_this_process_was_suspended_is_nobodys_silence() -> None:
    clock = Clock()
    watch = Watch(lambda: 100.0, clock)
    watch.look([worker(0)], (1,))
    clock.now += 3600
    assert wait(watch, clock, 90, [worker(0)], (1,)) is None


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_is_stopped_is_stuck_soon(child: subprocess.Popen[bytes]) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    clock = Clock()
    watch = Watch(lambda: LONGEST_S, clock)
    ranks = [worker(0), worker(1, child.pid)]
    assert wait(watch, clock, HALTED_S - 2, ranks, (1, 1)) is None
    stuck = wait(watch, clock, 4, ranks, (1, 1))
    assert [each.rank for each in stuck.workers] == [1]
    assert "state T" in stuck.reason


def test_a_process_that_goes_on_in_time_is_not_stuck(child: subprocess.Popen[bytes]) -> None:
    clock = Clock()
    watch = Watch(lambda: LONGEST_S, clock)
    for _ in range(3):
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert wait(watch, clock, HALTED_S - 2, [worker(0, child.pid)], (1,)) is None
        os.kill(child.pid, signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
        assert wait(watch, clock, 3, [worker(0, child.pid)], (1,)) is None


def test_the_state_of_a_process_that_has_ended(child: subprocess.Popen[bytes]) -> None:
    assert state(os.getpid()) == "R"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state(child.pid) == "Z"
    child.wait()
    assert state(child.pid) == ENDED
    assert {"Z", ENDED} <= pace.HALTED
    assert in_words("D") == "state D: it waits in the kernel and cannot be interrupted"
    assert in_words("?") == "state ?"


def test_patience_with_a_start_follows_the_slowest_one_so_far() -> None:
    starts = Pace(unknown=FIRST_START_S)
    assert starts.patience(2) == FIRST_START_S
    starts.measured(2, 50.0)
    starts.measured(2, 8.0)
    assert starts.patience(2) == FACTOR * 50.0
    assert starts.patience(8) == FIRST_START_S, "more workers are slower"
