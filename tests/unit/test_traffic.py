"""What a rank counts of its communication; real exchanges are in distributed/test_exposed.py."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.attention.traffic import Traffic


def test_waits_and_copies_are_added_up_apart():
    traffic = Traffic()
    for _ in range(2):
        with traffic.waiting():
            time.sleep(0.02)
        time.sleep(0.02)  # computing
    with traffic.copying():
        time.sleep(0.01)
    told = traffic.to_json()
    assert told["exposed_s"] >= 0.04 and 0.01 <= told["copying_s"] < told["exposed_s"]


def test_a_sampling_adds_up_its_passes():
    whole, one = Traffic(), Traffic(collectives=2, bytes_sent=5, exposed_s=0.5, copying_s=0.25)
    whole.include(one)
    whole.include(one)
    assert whole.to_json() == {"collectives": 4, "bytes_sent": 10, "exposed_s": 1.0, "copying_s": 0.5}


def test_a_wait_that_an_error_ends_does_not_count():
    traffic = Traffic()
    with pytest.raises(RuntimeError), traffic.waiting():
        raise RuntimeError("a peer has died")
    assert traffic.exposed_s == 0


def test_a_cuda_rank_times_its_stream_and_reads_nothing_before_it_is_asked_to(monkeypatch: pytest.MonkeyPatch):
    """With events that count instead of a GPU's; tests/gpu has real ones."""
    recorded: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            recorded.append(self)

        def elapsed_time(self, last: Event) -> float:
            return 1000.0 * (recorded.index(last) - recorded.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    traffic = Traffic(on_cuda=True)
    with traffic.waiting(), traffic.copying():
        pass
    assert (len(recorded), traffic.exposed_s, traffic.copying_s) == (4, 0.0, 0.0)
    traffic.read_events()
    traffic.read_events()
    assert (traffic.exposed_s, traffic.copying_s) == (3.0, 1.0)
