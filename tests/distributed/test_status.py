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
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of

DEVICES = on_ranks("cpu*2,cpu")
"""No other module's, so that the groups of others stay out of this."""


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
    remote.ensure_loaded()
    yield remote
    remote.unload()


def shown() -> dict:
    (group,) = running.snapshot()
    return group


def test_a_step_fills_in_what_is_shown(model: RemoteModel) -> None:
    before = shown()
    assert (before["state"], before["plan"], before["step"]) == ("idle", None, None)
    with Sampling(model.name, steps=3) as sampling:
        model.step(*Inputs().make())
        sampling.advance(1)
        group = shown()
    assert group["devices"] == DEVICES
    assert group["plan"] == {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 2, "reason": group["plan"]["reason"]}
    assert "auto" in group["plan"]["reason"]
    assert group["sampling"] == {"step": 1, "steps": 3, "running": True, "seconds_per_step": None}
    assert group["step"]["seconds"] == max(result["seconds"] for result in model.last_step)
    assert group["step"]["bytes_sent"] == max(result["bytes_sent"] for result in model.last_step) > 0
    assert model.group is not None
    assert [rank["pid"] for rank in group["ranks"]] == model.group.pids
    for number, rank in enumerate(group["ranks"]):
        assert (rank["state"], rank["device"]) == ("idle", str(device_of(number)))
        assert rank["title"] == ("CPU" if rank["device"] == "cpu" else torch.cuda.get_device_name())
        assert rank["weights"] == model.nbytes
        assert rank["weights"] < rank["memory"] < rank["total"]
        assert 0 < rank["free"] < rank["total"]
        assert rank["seconds"] > 0
    model.unload()
    assert [rank["weights"] for rank in shown()["ranks"]] == [0, 0]
    assert shown()["models"] == []


def test_the_phases_of_start_and_load_are_shown_and_are_no_more_than_the_whole(tiny_models: TinyModels) -> None:
    running.stop_all()
    remote = RemoteModel(recipe_of(tiny_models.path(), DEVICES))
    began = time.monotonic()
    remote.ensure_loaded()
    loaded = shown()
    remote.step(*Inputs().make())
    whole = time.monotonic() - began
    assert list(loaded["start"]) == ["python", "torch", "device", "meeting"]
    assert list(loaded["load"]) == ["libraries", "weights"]
    load = shown()["load"]
    assert list(load) == ["libraries", "weights", "self-check"]
    assert all(seconds >= 0 for seconds in [*loaded["start"].values(), *load.values()])
    assert loaded["start"]["torch"] > 0 and load["weights"] > 0 and load["self-check"] > 0
    assert sum(loaded["start"].values()) + sum(load.values()) <= whole
    remote.step(*Inputs().make())
    assert shown()["load"] == load


def test_a_worker_at_work_is_shown_as_such(model: RemoteModel) -> None:
    thread = threading.Thread(target=lambda: model.step(*Inputs(frames=4, height=32, width=32).make()))
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
        model.step(*Inputs(frames=4, height=32, width=32).make(), poll=cancel)
    assert wait_until(lambda: shown()["state"] == "idle", 20)
    assert [rank["state"] for rank in shown()["ranks"]] == ["idle", "idle"]
    assert model.group is not None and not model.group.busy, "idle workers would never leave"


def test_a_killed_worker_is_told_of_once_and_shown_until_others_take_its_place(
    model: RemoteModel, heard: list[Event]
) -> None:
    assert model.group is not None
    os.kill(model.group.pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        while True:
            model.step(*Inputs().make())
    assert [event.kind for event in heard] == ["crashed"]
    assert "rank 1" in heard[0].text
    group = shown()
    assert group["state"] == "dead"
    assert group["failure"] == heard[0].text
    assert [rank["state"] for rank in group["ranks"]] == ["stopped", "dead"]
    model.ensure_loaded()
    assert shown()["state"] == "idle"
    assert [event.kind for event in heard] == ["crashed", "started"]


def test_restart_works_in_the_middle_of_a_step(model: RemoteModel, heard: list[Event]) -> None:
    assert model.group is not None
    before = model.group.pids
    failures: list[EngineError] = []

    def run() -> None:
        try:
            while True:
                model.step(*Inputs(frames=4, height=32, width=32).make())
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
    model.ensure_loaded()
    assert model.group is not None
    assert [event.kind for event in heard] == ["started"], "loading started workers though some were there"
    assert set(model.group.pids).isdisjoint(before)


def test_idle_workers_leave_and_busy_ones_stay(model: RemoteModel, heard: list[Event]) -> None:
    assert model.group is not None
    pids = model.group.pids
    running.end_idle(0)
    running.end_idle(60)
    with Sampling(model.name, steps=2):
        time.sleep(0.2)
        running.end_idle(0.1)
    assert model.group.alive, "left between the steps of a sampling, or before its time"
    running.end_idle(0.1)
    assert not model.loaded
    assert running.snapshot() == []
    assert wait_until(lambda: not any(map(is_running, pids)), 5)
    assert [event.kind for event in heard] == ["left"]
