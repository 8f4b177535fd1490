"""What a rank has sent to others, and how long it stood still for them: counted and timed where it happens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Traffic:
    """Counters of one step or one measurement; backward passes are not counted.

    Both times are wall time of a CPU rank. Of a CUDA rank they are time of its compute stream, between events that are
    recorded without waiting for the device.
    """

    collectives: int = 0
    """All-to-alls, ring exchanges and a cache's sums that this rank has taken part in."""
    bytes_sent: int = 0
    """Bytes that have left this rank."""
    exposed_s: float = 0.0
    """Exposed communication: seconds in which this rank could not compute, as it waited for what others send. What
    arrives while it computes costs nothing here; waiting for a slower rank counts, and so does gathering the weights
    that ranks share out."""
    copying_s: float = 0.0
    """Seconds of copying to and from the buffers of attention's exchanges. They are this rank's own work, and not part
    of `exposed_s`."""
    on_cuda: bool = False
    """Whether this rank computes on a CUDA device."""
    _pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, bytes_sent: int) -> None:
        self.collectives += 1
        self.bytes_sent += bytes_sent

    def waiting(self) -> _Interval:
        """Around every wait for other ranks; a context manager."""
        return _Interval(self, "exposed_s")

    def copying(self) -> _Interval:
        """Around copies to and from an exchange; a context manager."""
        return _Interval(self, "copying_s")

    def include(self, other: Traffic) -> None:
        """Adds what another one has counted; its events must have been read."""
        assert not other._pairs
        self.collectives += other.collectives
        self.bytes_sent += other.bytes_sent
        self.exposed_s += other.exposed_s
        self.copying_s += other.copying_s

    def read_events(self) -> None:
        """Adds up what CUDA events say; when the device has done all that they lie between."""
        for figure, first, last in self._pairs:
            self.count(figure, first.elapsed_time(last) / 1000)
        self._pairs.clear()

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "collectives": self.collectives,
            "bytes_sent": self.bytes_sent,
            "exposed_s": self.exposed_s,
            "copying_s": self.copying_s,
        }

    def count(self, figure: str, seconds: float) -> None:
        """Adds to `exposed_s` or `copying_s`."""
        setattr(self, figure, getattr(self, figure) + seconds)

    def count_between(self, figure: str, first: torch.cuda.Event, last: torch.cuda.Event) -> None:
        """The same, when the device has come so far, see `read_events`."""
        self._pairs.append((figure, first, last))


class _Interval:
    """Adds its length to a figure; nothing where an error ends it. There are a hundred or more of them in a step."""

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
