"""What a rank has sent to others, counted where it is sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Counters of one step or one measurement; backward passes are not counted."""

    collectives: int = 0
    """All-to-alls, ring exchanges and a cache's sums that this rank has taken part in."""
    bytes_sent: int = 0
    """Bytes that have left this rank."""

    def add(self, bytes_sent: int) -> None:
        self.collectives += 1
        self.bytes_sent += bytes_sent
