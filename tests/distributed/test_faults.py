"""Workers that break or run out of memory: one message soon, and the next prompt works."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.config import SequenceParallelConfig
from parallel.errors import EngineError, WorkerDiedError, WorkerError, WorkerOutOfMemoryError
from parallel.host import calls, pace, running, status
from parallel.host import process as process_module
from parallel.host.cached_sampling import CachedSampling
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import Echo, FreeMemory, Operation, UnloadVAE
from parallel.wire.shared import lay_out
from tests.distributed.events import heard
from tests.distributed.faults import Faults, make_unkillable
from tests.distributed.faulty_boot import AND_BROKEN, AND_HANGS, BROKEN, HELD_BYTES, OUT_OF_MEMORY
from tests.distributed.process_facts import all_ended, memory, wait_until
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of, step

pytestmark = pytest.mark.slow

ONE, TWO, THREE = "cpu", "cpu,cpu", "cpu,cpu,cpu"
Layout = tuple[str, str]
"""Devices, and a setting as in `SequenceParallelConfig`."""
TITLE = "cpu"
"""How messages name a device of these."""
SMALL = Inputs(valid=(5,))
SOON_S = 60.0
"""What counts as hanging, also on a busy machine, from the failure to its message."""


@dataclass
class Case:
    """A model on workers that can be told to fail."""

    model: RemoteModel
    expected: torch.Tensor
    faults: Faults
    events: list[status.Event]

    @property
    def group(self) -> WorkerGroup:
        assert self.model.weights.group is not None
        return self.model.weights.group

    def step(self) -> torch.Tensor:
        return step(self.model, SMALL)

    def fails(self, kind: type[WorkerError]) -> WorkerError:
        """The error of the next step, which is told once and soon."""
        self.events.clear()
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            self.step()
        assert time.monotonic() - began <= SOON_S
        assert type(caught.value) is kind
        self.faults.clear()
        wanted = status.OUT_OF_MEMORY if kind is WorkerOutOfMemoryError else status.CRASHED
        assert [(event.kind, event.text) for event in self.events] == [(wanted, str(caught.value))]
        return caught.value

    def goes_on(self, pids: list[int]) -> None:
        """The same workers give the right result, with the weights that they have."""
        assert self.model.weights.loaded
        seen = spy_on_calls(self.group)
        self.model.weights.ensure_loaded()
        assert torch.equal(self.step(), self.expected)
        assert seen == ["step"]
        assert self.group.pids == pids

    def starts_anew(self, pids: list[int]) -> None:
        """Fresh workers give the right result."""
        assert wait_until(lambda: all_ended(pids), SOON_S), "a worker is left"
        assert not self.model.weights.loaded
        self.model.weights.ensure_loaded()
        assert set(self.group.pids).isdisjoint(pids)
        assert torch.equal(self.step(), self.expected)


def spy_on_calls(group: WorkerGroup) -> list[str]:
    """Operations of every call from here on."""
    seen: list[str] = []
    call = group.call

    def spy(message: Operation, **options: Any) -> Any:
        seen.append(message.name)
        return call(message, **options)

    group.call = spy  # type: ignore[method-assign]
    return seen


@pytest.fixture
def events() -> Iterator[list[status.Event]]:
    """Of trouble."""
    with heard(status.CRASHED, status.OUT_OF_MEMORY) as events:
        yield events


@pytest.fixture(scope="module")
def right(tiny_models: TinyModels) -> dict[Layout, torch.Tensor]:
    """Results of workers that nothing has happened to."""
    return {}


@pytest.fixture(scope="module")
def layout(request: pytest.FixtureRequest) -> Layout:
    """Devices and settings. Its scope has pytest run the tests of one layout in a row: each starts workers once."""
    return request.param if isinstance(request.param, tuple) else (request.param, "weights=replicate")


@pytest.fixture
def case(
    layout: Layout,
    faults: Faults,
    tiny_models: TinyModels,
    right: dict[Layout, torch.Tensor],
    events: list[status.Event],
) -> Iterator[Case]:
    devices, setting = layout
    faults.clear()
    name, value = setting.split("=")
    settings = {name: int(value) if value.isdecimal() else value}
    model = RemoteModel(recipe_of(tiny_models.path(heads=3, num_single_layers=4), devices, **settings))
    model.weights.ensure_loaded()
    expected = right.setdefault(layout, step(model, SMALL).clone())
    yield Case(model, expected, faults, events)
    faults.clear()
    model.weights.unload()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that must not fail because the machine is busy: all ranks will answer."""
    for name in ("_GRACE_OUT_OF_MEMORY_S", "_PROBE_S"):
        monkeypatch.setattr(calls, name, 60.0)


def ranks_of(case: Case) -> range:
    return range(len(case.group.pids))


# --- out of memory ------------------------------------------------------------------------------------------------


def extended(*values: object) -> object:
    """Further cases of what the plain run shows with two workers."""
    return pytest.param(*values, marks=pytest.mark.extended)


EVERYWHERE = [
    TWO,
    extended(ONE),
    extended(THREE),
    *(extended((TWO, f"weights={mode}")) for mode in ("shard", "offload")),
]
SHARD, RING = (TWO, "weights=shard"), (TWO, "ring_degree=2")


@pytest.mark.parametrize("layout", EVERYWHERE, indirect=True, ids=str)
def test_out_of_memory_on_all_keeps_the_workers_and_their_weights(case: Case, patient: None) -> None:
    pids = list(case.group.pids)
    case.faults.order(OUT_OF_MEMORY, ranks_of(case), place="before block")
    error = case.fails(WorkerOutOfMemoryError)
    assert re.search(rf"worker rank {error.rank} \({TITLE}\S*, pid {pids[error.rank]}\) failed in 'step'", str(error))
    assert f"GPU {error.rank} has a total capacity" in str(error)
    assert re.search(r"memory in use there: \d+ MiB", str(error))
    assert "Use a smaller size" in str(error)
    case.goes_on(pids)


@pytest.mark.parametrize("layout", [extended(TWO), extended(SHARD), RING], indirect=True, ids=str)
@pytest.mark.parametrize("place", ["before exchange", extended("after exchange")])
def test_out_of_memory_on_all_at_an_exchange_keeps_the_workers(case: Case, patient: None, place: str) -> None:
    pids = list(case.group.pids)
    case.faults.order(OUT_OF_MEMORY, ranks_of(case), place=place)
    case.fails(WorkerOutOfMemoryError)
    case.goes_on(pids)


@pytest.mark.cpu_ranks("what leaves more memory after what is another order on GPUs")
@pytest.mark.parametrize("kept", [True, False], ids=["all ranks", "one rank"])
def test_auto_takes_a_smaller_mode_after_out_of_memory(
    request: pytest.FixtureRequest, tiny_models: TinyModels, faults: Faults, events: list[status.Event], kept: bool
) -> None:
    """Of weights whose dtype changes, so that each worker has a copy."""
    if kept:
        request.getfixturevalue("patient")
    faults.clear()
    inputs = replace(SMALL, dtype=torch.bfloat16)
    recipe = recipe_of(tiny_models.path(heads=3), TWO, torch.bfloat16)
    model = RemoteModel(recipe)
    model.weights.ensure_loaded()
    assert model.weights.placement is not None and model.weights.placement.mode == "replicate"
    expected, pids = step(model, inputs).clone(), model.weights.settled(None).pids
    faults.order(OUT_OF_MEMORY, [0, 1] if kept else [1], place="before block")
    with pytest.raises(WorkerOutOfMemoryError, match="The next prompt takes weights 'offload'") as caught:
        step(model, inputs)
    assert [event.text for event in events] == [str(caught.value)]
    faults.clear()

    model.weights.ensure_loaded()
    assert (model.weights.settled(None).pids == pids) == kept
    assert model.weights.placement.mode == "offload"
    assert "replicate ran out of memory" in model.weights.placement.reason
    assert torch.equal(step(model, inputs), expected)
    model.weights.ensure_loaded()
    faults.order(OUT_OF_MEMORY, [0, 1], place="before block")
    with pytest.raises(WorkerOutOfMemoryError) as caught:
        step(model, inputs)
    assert "The next prompt takes" not in str(caught.value), "nothing is smaller"
    faults.clear()
    model.weights.unload()


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_what_was_alive_where_memory_ran_out_is_freed(case: Case, patient: None) -> None:
    case.faults.order(OUT_OF_MEMORY, ranks_of(case))
    before = [memory(pid, "Anon") for pid in case.group.pids]
    case.fails(WorkerOutOfMemoryError)
    grown = [memory(pid, "Anon") - was for pid, was in zip(case.group.pids, before, strict=True)]
    assert max(grown) < HELD_BYTES / 2


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_a_cached_sampling_begins_anew_after_out_of_memory(case: Case, patient: None) -> None:
    """Its first step computes everything, as if there had been none before."""
    cache = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=1e6))
    request = SMALL.make()
    case.model.steps([request], cache=cache)
    case.model.steps([request], cache=cache)
    assert cache.report.hits == 1
    case.faults.order(OUT_OF_MEMORY, ranks_of(case), count=1)
    with pytest.raises(WorkerOutOfMemoryError):
        case.model.steps([request], cache=cache)
    case.faults.clear()
    (result,) = case.model.steps([request], cache=cache)
    assert [rank["cache"]["hits"] for rank in case.model.last_step] == [0, 0]
    assert torch.equal(result, case.expected)


@pytest.mark.parametrize("layout", [extended(ONE), TWO], indirect=True)
def test_out_of_memory_on_all_while_loading_keeps_the_workers(case: Case, patient: None) -> None:
    pids, ranks = list(case.group.pids), ranks_of(case)
    case.model.weights.unload()
    case.faults.order(OUT_OF_MEMORY, ranks, place="before parameter")
    with pytest.raises(WorkerOutOfMemoryError, match="failed in 'load'"):
        case.model.weights.ensure_loaded()
    case.faults.clear()
    assert not case.model.weights.loaded
    case.model.weights.ensure_loaded()
    assert torch.equal(case.step(), case.expected)
    assert case.group.pids == pids


@pytest.mark.parametrize("layout", [TWO, extended(THREE)], indirect=True)
def test_out_of_memory_on_one_starts_anew(case: Case) -> None:
    pids = list(case.group.pids)
    case.faults.order(OUT_OF_MEMORY, [1])
    error = case.fails(WorkerOutOfMemoryError)
    assert error.rank == 1
    assert re.search(rf"worker rank 1 \({TITLE}\S*, pid {pids[1]}\) failed in 'step'", str(error))
    assert "next prompt starts fresh ones" in str(error)
    case.starts_anew(pids)


@pytest.mark.parametrize("layout", [TWO, extended(RING)], indirect=True, ids=str)
def test_out_of_memory_on_both_sides_of_an_exchange_starts_anew(case: Case, patient: None) -> None:
    """Both reply at once; but one has launched an exchange that the other one has not."""
    pids = list(case.group.pids)
    case.faults.order(OUT_OF_MEMORY, rank0="before exchange", rank1="after exchange")
    assert "next prompt starts fresh ones" in str(case.fails(WorkerOutOfMemoryError))
    case.starts_anew(pids)


@pytest.mark.parametrize("layout", [extended(ONE), TWO], indirect=True)
def test_out_of_memory_that_breaks_the_device_starts_anew(case: Case, patient: None) -> None:
    pids = list(case.group.pids)
    case.faults.order(AND_BROKEN, ranks_of(case))
    assert "next prompt starts fresh ones" in str(case.fails(WorkerOutOfMemoryError))
    case.starts_anew(pids)


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_out_of_memory_that_leaves_the_device_hanging_starts_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_PROBE_S", 1.0)
    pids = list(case.group.pids)
    case.faults.order(AND_HANGS, ranks_of(case))
    assert "next prompt starts fresh ones" in str(case.fails(WorkerOutOfMemoryError))
    case.starts_anew(pids)


# --- broken contexts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "broken"),
    [extended(ONE, [0]), (TWO, [1]), extended(TWO, [0, 1]), extended(THREE, [2])],
    indirect=["layout"],
    ids=str,
)
def test_a_broken_context_starts_anew(case: Case, broken: list[int]) -> None:
    pids = list(case.group.pids)
    case.faults.order(BROKEN, broken)
    error = case.fails(WorkerError)
    assert error.rank in broken
    named = rf"worker rank {error.rank} \({TITLE}\S*, pid {pids[error.rank]}\) failed in 'step': "
    assert re.search(rf"{named}\w+: CUDA error: ", str(error))
    assert re.search(r"memory in use there: [1-9]\d* MiB", str(error))
    assert "look for 'Xid' in dmesg" in str(error)
    assert "next prompt starts fresh ones" in str(error)
    case.starts_anew(pids)


@pytest.mark.parametrize("layout", [TWO], indirect=True)
@pytest.mark.parametrize(("kind", "kept"), [extended(BROKEN, False), (OUT_OF_MEMORY, True)])
def test_a_task_that_breaks_the_context_ends_the_group(case: Case, kind: str, kept: bool) -> None:
    """Tasks are VAE tiles, of which others may still be computed after an out of memory."""
    pids, group = list(case.group.pids), case.group
    (source, target), size = lay_out("echo", [((4,), torch.float32)] * 2)
    group.memory.segment("echo", size)
    message = Echo(x=source, out=target)
    group.call(message)
    case.faults.order(kind, [1], place="before echo", count=1)
    case.events.clear()
    with group.tasks():
        task = group.submit(1, message)
        group.wait_for(lambda: task.answered)
        error = group.task_error(task, "ADVICE")
    case.faults.clear()
    assert error.rank == 1
    assert [event.text for event in case.events] == [str(error)]
    if kept:
        assert "ADVICE" in str(error)
        case.goes_on(pids)
    else:
        assert "CUDA error" in str(error)
        case.starts_anew(pids)


# --- workers that do not end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["out of memory", extended("stopped by the user")])
def test_a_worker_that_cannot_be_ended_is_left_behind(
    how: str,
    faults: Faults,
    tiny_models: TinyModels,
    events: list[status.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running.stop_all()
    faults.clear()
    started = make_unkillable(1, monkeypatch)
    model = RemoteModel(recipe_of(tiny_models.path(heads=3, num_single_layers=4), TWO, weights="replicate"))
    model.weights.ensure_loaded()
    expected = step(model, SMALL).clone()
    (stuck,) = started
    group = model.weights.group
    assert group is not None
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    os.kill(stuck.pid, signal.SIGSTOP)  # so that it stays until it is let go
    try:
        began = time.monotonic()
        if how == "out of memory":  # of the other one
            faults.order(OUT_OF_MEMORY, [0], count=1)
            with pytest.raises(WorkerOutOfMemoryError, match="rank 0") as caught:
                step(model, SMALL)
            assert str(caught.value) == events[0].text
            faults.clear()
        else:
            running.stop_all()
        assert time.monotonic() - began <= SOON_S
        (event,) = events
        assert f"worker rank 1 ({TITLE}, pid {stuck.pid}) does not end, not even by SIGKILL" in event.text
        assert re.search(r"left behind \(state \w", event.text)
        assert len(list(Path("/proc/self/fd").iterdir())) < open_files, "nothing has been closed"
        model.weights.ensure_loaded()
        assert torch.equal(step(model, SMALL), expected)
        assert stuck.pid not in model.weights.group.pids
    finally:
        stuck.let_go()


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_a_stopped_worker_is_noticed_soon_and_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, which no sign of life will follow however long one waits."""
    monkeypatch.setattr(pace, "HALTED_S", 2.0)
    pids = list(case.group.pids)
    os.kill(pids[1], signal.SIGSTOP)
    error = case.fails(WorkerDiedError)
    assert error.rank == 1
    assert re.search(r"stopped answering in 'step': for \d+ s the process has been in state T", str(error))
    case.starts_anew(pids)


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_a_worker_that_takes_no_messages_is_noticed_and_named(
    case: Case, faults: Faults, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.model.weights.unload()
    running.stop_all()
    monkeypatch.setattr(process_module, "SEND_TIMEOUT_S", 1.0)
    case.model.weights.ensure_loaded()
    pids = list(case.group.pids)
    os.kill(pids[1], signal.SIGSTOP)
    case.events.clear()
    with pytest.raises(WorkerDiedError, match=r"worker rank 1 .* has read nothing of what it was sent .*state T"):
        case.group.call(UnloadVAE(vae=" " * (8 << 20)))
    assert len(case.events) == 1
    case.starts_anew(pids)


# --- one caller waits for another one -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_a_caller_that_waits_for_another_one_can_be_cancelled(case: Case) -> None:
    class Cancelled(Exception):
        pass

    entered, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        with case.group.tasks():
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=occupy)
    other.start()
    assert entered.wait(10)

    def poll() -> None:
        raise Cancelled

    try:
        with pytest.raises(Cancelled):
            case.group.call(FreeMemory(), poll=poll)
    finally:
        leave.set()
        other.join()
    assert torch.equal(case.step(), case.expected)


def test_waiting_for_workers_that_another_thread_starts_can_be_cancelled() -> None:
    class Cancelled(Exception):
        pass

    def poll() -> None:
        raise Cancelled

    with running._lock, pytest.raises(Cancelled):
        running.acquire(SequenceParallelConfig(devices=TWO), poll)


@pytest.mark.parametrize("layout", [TWO], indirect=True)
def test_a_restart_during_a_failure_is_not_told_as_another_one(case: Case) -> None:
    """The user's restart ends the call; there is nothing else to tell."""
    case.events.clear()
    threading.Timer(0.3, lambda: case.group.stop("restarted")).start()
    with pytest.raises(EngineError, match="restarted"):
        for _ in range(10_000):
            case.step()
    assert case.events == []
