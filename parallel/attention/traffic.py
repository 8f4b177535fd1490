"""Communication counters of a rank: bytes sent to other ranks, and time exposed, recorded where they occur."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Traffic:
    """Counters of one step or one measurement; backward passes are not counted.

    On a CPU rank both times are wall time. On a CUDA rank they are time of its compute stream, between events that are
    recorded without waiting for the device.
    """

    collectives: int = 0
    """Number of all-to-alls, ring exchanges and all-reduces of a cache in which this rank has taken part."""
    bytes_sent: int = 0
    """Bytes that this rank has sent in these collectives."""
    exposed_s: float = 0.0
    """Exposed communication: seconds in which this rank could not compute because it waited for other ranks' data. Data
    that arrives during computation adds nothing; waiting for a slower rank counts, and so does gathering sharded
    weights."""
    copying_s: float = 0.0
    """Seconds of copying to and from the buffers of attention's exchanges. This is the rank's own work, not part of
    `exposed_s`."""
    on_cuda: bool = False
    """True if this rank computes on a CUDA device."""
    _pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, bytes_sent: int) -> None:
        self.collectives += 1
        self.bytes_sent += bytes_sent

    def waiting(self) -> _Interval:
        """Returns a context manager that times a wait for other ranks."""
        return _Interval(self, "exposed_s")

    def copying(self) -> _Interval:
        """Returns a context manager that times copies to and from the buffers of an exchange."""
        return _Interval(self, "copying_s")

    def include(self, other: Traffic) -> None:
        """Adds the counters of `other`, whose events must have been read."""
        assert not other._pairs
        self.collectives += other.collectives
        self.bytes_sent += other.bytes_sent
        self.exposed_s += other.exposed_s
        self.copying_s += other.copying_s

    def read_events(self) -> None:
        """Adds the times between the recorded CUDA events; only after the device has passed all of them."""
        for figure, first, last in self._pairs:
            self.count(figure, first.elapsed_time(last) / 1000)
        self._pairs.clear()

    def to_json(self) -> dict[str, Any]:
        """Returns the counters."""
        return {
            "collectives": self.collectives,
            "bytes_sent": self.bytes_sent,
            "exposed_s": self.exposed_s,
            "copying_s": self.copying_s,
        }

    def count(self, figure: str, seconds: float) -> None:
        """Adds `seconds` to the counter named `figure`: `exposed_s` or `copying_s`."""
        setattr(self, figure, getattr(self, figure) + seconds)

    def count_between(self, figure: str, first: torch.cuda.Event, last: torch.cuda.Event) -> None:
        """Records two events; `read_events` adds the time between them to the counter named `figure`."""
        self._pairs.append((figure, first, last))


class _Interval:
    """Interval whose duration is added to a counter, unless an exception ends it. A step has a hundred or more."""

    __slots__ = ("_began", "_figure", "_first", "_traffic")

    def __init__(self, traffic: Traffic, figure: str):
        self._traffic, self._figure = traffic, figure

    def __enter__(self) -> None:
        if self._traffic.on_cuda:
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._traffic.on_cuda:
            last = torch.cuda.Event(enable_timing=True)
            last.record()
            self._traffic.count_between(self._figure, self._first, last)
        else:
            self._traffic.count(self._figure, time.perf_counter() - self._began)
