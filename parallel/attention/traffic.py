"""What a rank has sent to others, and how long it stood still for them: counted and timed where it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Traffic:
    """Counters of one step or one measurement; backward passes are not counted.

    Both times are wall time of a CPU rank. Of a CUDA rank they are time of its compute stream, between events that are
    recorded without waiting for the device (not yet run on a GPU).
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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every wait for other ranks."""
        with self._timed("exposed_s"):
            yield

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Around copies to and from an exchange."""
        with self._timed("copying_s"):
            yield

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
            self._count(figure, first.elapsed_time(last) / 1000)
        self._pairs.clear()

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "collectives": self.collectives,
            "bytes_sent": self.bytes_sent,
            "exposed_s": self.exposed_s,
            "copying_s": self.copying_s,
        }

    @contextmanager
    def _timed(self, figure: str) -> Iterator[None]:
        if self.on_cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._pairs.append((figure, first, last))
            return
        began = time.perf_counter()
        yield
        self._count(figure, time.perf_counter() - began)

    def _count(self, figure: str, seconds: float) -> None:
        setattr(self, figure, getattr(self, figure) + seconds)
