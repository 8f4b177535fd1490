"""What is noted for those who watch the workers: steps, figures, events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from parallel.degrees import Degrees
from parallel.host import status
from parallel.host.status import Event, GroupFigures, Sampling

CACHE = {"name": "First Block Cache (SP)", "hits": 3, "passes": 9, "seconds": 1.0, "seconds_saved": 0.5}


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    status.listen(events.append)
    yield events
    status._listeners.remove(events.append)


def results(*seconds: float) -> list[dict[str, Any]]:
    return [
        {"seconds": value, "collectives": 4, "bytes_sent": 100 * rank, "exposed_s": value / 4, "copying_s": value / 8}
        for rank, value in enumerate(seconds)
    ]


def stepped(work: str, *seconds: float, cache: dict[str, Any] | None = None) -> dict[str, Any]:
    figures = GroupFigures()
    figures.stepped(work, Degrees(ulysses=len(seconds)), "as asked", results(*seconds), cache)
    return figures.to_json()


def test_a_step_is_compared_with_the_last_one_of_the_same_work_on_one_device():
    assert stepped("this video", 1.0, 2.0)["speedup"] is None
    stepped("this video", 9.0)
    stepped("this video", 6.0)
    stepped("another size", 50.0)
    assert stepped("this video", 1.0, 2.0)["speedup"] == pytest.approx(6.0 / 2.0)
    assert stepped("a third", 1.0, 2.0)["speedup"] is None


def test_a_step_with_a_cache_is_compared_with_nothing():
    stepped("cached", 6.0)
    shown = stepped("cached", 1.0, 2.0, cache=CACHE)
    assert shown["speedup"] is None
    assert shown["cache"] == CACHE
    stepped("cached alone", 6.0, cache=CACHE)
    assert stepped("cached alone", 1.0, 2.0)["speedup"] is None


def test_a_step_shows_its_plan_and_the_most_that_a_rank_sent_and_waited():
    shown = stepped("plan", 1.0, 2.0)
    assert shown["plan"] == {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 2, "reason": "as asked"}
    assert shown["step"] == {"seconds": 2.0, "collectives": 4, "bytes_sent": 100, "exposed_s": 0.5, "copying_s": 0.25}


def test_phases_are_those_of_the_worker_that_the_others_waited_for():
    figures = GroupFigures()
    assert (figures.to_json()["start"], figures.to_json()["load"]) == ({}, {})
    quick = {"python": 0.1, "torch": 1.0, "device": 0.2, "meeting": 2.4}
    slow = {"python": 0.1, "torch": 3.0, "device": 0.4, "meeting": 0.2}
    figures.started([quick, slow])
    figures.loaded([{"libraries": 1.0, "weights": 0.5}, {"libraries": 0.7, "weights": 0.9}])
    assert figures.to_json()["start"] == slow
    assert figures.to_json()["load"] == {"libraries": 0.7, "weights": 0.9}
    assert status.phases_text(figures.start) == "python 0.1 s, torch 3.0 s, device 0.4 s, meeting 0.2 s"


def test_weights_are_counted_while_they_are_held():
    figures = GroupFigures()
    figures.holds("model-1", "/models/flux.safetensors", 70)
    figures.holds("vae-1", "VAE", 5)
    assert (figures.weights, figures.to_json()["models"]) == (75, ["flux.safetensors", "VAE"])
    figures.dropped("model-1")
    figures.dropped("model-1")
    assert (figures.weights, figures.to_json()["models"]) == (5, ["VAE"])


def test_the_first_step_is_left_out_of_the_time_per_step(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Sampling("model-7", steps=4) as sampling:
        now += 60  # workers start, weights are read
        sampling.advance(1)
        assert sampling.to_json() == {"step": 1, "steps": 4, "running": True, "seconds_per_step": None}
        for step in (2, 3):
            now += 2.5
            sampling.advance(step)
        assert sampling.seconds_per_step == 2.5
    assert sampling.to_json() == {"step": 3, "steps": 4, "running": False, "seconds_per_step": 2.5}
    sampling.advance(9)  # dpm_adaptive
    assert (sampling.step, sampling.steps) == (9, 9)


def test_a_sampling_is_shown_by_the_group_that_has_its_model():
    figures = GroupFigures()
    figures.holds("model-8", "wan.safetensors", 1)
    with Sampling("model-8", steps=2) as sampling:
        sampling.advance(1)
        assert figures.to_json()["sampling"]["step"] == 1
        assert GroupFigures().to_json()["sampling"] is None


def test_trouble_is_kept_for_the_report_and_the_rest_is_not(heard: list[Event]):
    before = time.time()
    status.tell(status.STARTED, "two workers")
    status.tell(status.CRASHED, "rank 1 was ended")
    assert [(event.kind, event.text) for event in heard] == [
        ("started", "two workers"),
        ("crashed", "rank 1 was ended"),
    ]
    assert before <= heard[0].time <= time.time()
    assert status.errors()[-1] == heard[1]
    assert heard[0] not in status.errors()


def test_a_listener_that_fails_disturbs_nobody(heard: list[Event]):
    def broken(_: Event) -> None:
        raise RuntimeError("no")

    status._listeners.insert(0, broken)
    try:
        status.tell(status.FALLBACK, "computed natively")
    finally:
        status._listeners.remove(broken)
    assert heard[-1].kind == "fallback"
