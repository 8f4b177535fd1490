"""What the host shows of running workers, restarting them, and their leaving when idle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from parallel.errors import EngineError, WorkerDiedError
from parallel.host import running, status
from parallel.host.remote_model import RemoteModel
from parallel.host.status import Event, Sampling
from tests.distributed.devices import device_of, on_ranks
from tests.distributed.process_facts import is_running, wait_until
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of, step

DEVICES = on_ranks("cpu*2,cpu")
"""No other module's, so that the groups of others stay out of this."""
LONG = Inputs(frames=4, height=32, width=32)


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    running.stop_all()
    yield
    running.stop_all()


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    status.listen(events.append)
    yield events
    status._listeners.remove(events.append)


@pytest.fixture
def model(tiny_models: TinyModels) -> Iterator[RemoteModel]:
    remote = RemoteModel(recipe_of(tiny_models.path(), DEVICES))
    remote.weights.ensure_loaded()
    yield remote
    remote.weights.unload()


def shown() -> dict:
    (group,) = running.snapshot()
    return group


def test_a_step_fills_in_what_is_shown(model: RemoteModel) -> None:
    before = shown()
    assert (before["state"], before["plan"], before["step"]) == ("idle", None, None)
    with Sampling(model.name, steps=3) as sampling:
        step(model, Inputs())
        sampling.advance(1)
        group = shown()
    assert group["devices"] == DEVICES
    assert group["plan"] == {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 2, "reason": group["plan"]["reason"]}
    assert "auto" in group["plan"]["reason"]
    assert group["sampling"] == {"step": 1, "steps": 3, "running": True, "seconds_per_step": None}
    assert group["step"]["seconds"] == max(result["seconds"] for result in model.last_step)
    assert group["step"]["bytes_sent"] == max(result["bytes_sent"] for result in model.last_step) > 0
    assert model.weights.group is not None
    assert [rank["pid"] for rank in group["ranks"]] == model.weights.group.pids
    for number, rank in enumerate(group["ranks"]):
        assert (rank["state"], rank["device"]) == ("idle", str(device_of(number)))
        assert rank["title"] == ("CPU" if rank["device"] == "cpu" else torch.cuda.get_device_name())
        assert rank["weights"] == model.weights.nbytes
        assert rank["weights"] < rank["memory"] < rank["total"]
        assert 0 < rank["free"] < rank["total"]
        assert rank["seconds"] > 0
    model.weights.unload()
    assert [rank["weights"] for rank in shown()["ranks"]] == [0, 0]
    assert shown()["models"] == []


@pytest.mark.slow
def test_the_phases_of_start_and_load_are_shown_and_are_no_more_than_the_whole(tiny_models: TinyModels) -> None:
    running.stop_all()
    remote = RemoteModel(recipe_of(tiny_models.path(), DEVICES))
    began = time.monotonic()
    remote.weights.ensure_loaded()
    whole = time.monotonic() - began
    start, load = shown()["start"], shown()["load"]
    assert list(start) == ["python", "torch", "device", "meeting"]
    assert list(load) == ["libraries", "weights"]
    assert all(seconds >= 0 for seconds in [*start.values(), *load.values()])
    assert start["torch"] > 0 and load["weights"] > 0
    assert sum(start.values()) + sum(load.values()) <= whole
    step(remote, Inputs())
    assert shown()["load"] == load


def test_a_worker_at_work_is_shown_as_such(model: RemoteModel) -> None:
    thread = threading.Thread(target=lambda: step(model, LONG))
    thread.start()
    assert wait_until(lambda: shown()["state"] == "step", 20)
    thread.join()
    assert shown()["state"] == "idle"


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


def test_after_a_cancel_the_workers_are_shown_idle(model: RemoteModel) -> None:
    def cancel() -> None:
        if shown()["state"] == "step":
            raise Cancelled

    with pytest.raises(Cancelled):
        model.steps([LONG.make()], poll=cancel)
    assert wait_until(lambda: shown()["state"] == "idle", 20)
    assert [rank["state"] for rank in shown()["ranks"]] == ["idle", "idle"]
    assert model.weights.group is not None and not model.weights.group.busy, "idle workers would never leave"


@pytest.mark.slow
def test_a_killed_worker_is_told_of_once_and_shown_until_others_take_its_place(
    model: RemoteModel, heard: list[Event]
) -> None:
    assert model.weights.group is not None
    os.kill(model.weights.group.pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        while True:
            step(model, Inputs())
    assert [event.kind for event in heard] == ["crashed"]
    assert "rank 1" in heard[0].text
    group = shown()
    assert group["state"] == "dead"
    assert group["failure"] == heard[0].text
    assert [rank["state"] for rank in group["ranks"]] == ["stopped", "dead"]
    model.weights.ensure_loaded()
    assert shown()["state"] == "idle"
    assert [event.kind for event in heard] == ["crashed", "started"]


@pytest.mark.slow
def test_restart_works_in_the_middle_of_a_step(model: RemoteModel, heard: list[Event]) -> None:
    assert model.weights.group is not None
    before = model.weights.group.pids
    failures: list[EngineError] = []

    def run() -> None:
        try:
            while True:
                step(model, LONG)
        except EngineError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: shown()["state"] == "step", 20)
    assert running.restart() == 1
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "were restarted while this prompt ran" in str(failures[0])
    assert not any(map(is_running, before))
    assert [event.kind for event in heard] == ["started"]
    assert (shown()["state"], shown()["models"]) == ("idle", [])
    model.weights.ensure_loaded()
    assert model.weights.group is not None
    assert [event.kind for event in heard] == ["started"], "loading started workers though some were there"
    assert set(model.weights.group.pids).isdisjoint(before)


def test_idle_workers_leave_and_busy_ones_stay(model: RemoteModel, heard: list[Event]) -> None:
    assert model.weights.group is not None
    pids = model.weights.group.pids
    running.end_idle(0)
    running.end_idle(60)
    with Sampling(model.name, steps=2):
        time.sleep(0.2)
        running.end_idle(0.1)
    assert model.weights.group.alive, "left between the steps of a sampling, or before its time"
    running.end_idle(0.1)
    assert not model.weights.loaded
    assert running.snapshot() == []
    assert wait_until(lambda: not any(map(is_running, pids)), 60)
    assert [event.kind for event in heard] == ["left"]
