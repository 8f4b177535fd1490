"""Limit on how many blocks a rank's host code runs ahead of its CUDA device, derived from the time per block.

Launches return at once. Queued work hides their cost but delays Cancel, because queued kernels still run. So at most
about 50 ms of blocks are queued, estimated from the pace of the last pass of the same split: none if a block takes
longer than that, up to eight if blocks are short. Waiting for the device before each long block costs one launch, about
0.1 ms.

All ranks of a sequence run ahead by the same number of blocks, which Cancel's agreement requires (`wire.control`):
before the first block of a pass they agree on the slowest rank's pace. This is the only exchange, once per pass; if any
rank does not know its pace, all ranks treat it as unknown.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable

from torch.cuda import Event

QUEUED_S = 0.05
"""Maximum seconds of queued work."""
MOST = 8
"""Maximum number of queued blocks; more would not hide more of the launch cost."""

Paces = dict[Hashable, float]
"""Maps each split to the seconds per block on the device in its last pass."""


class RunAhead:
    """Run-ahead control of one pass: of one step, or of one pass through the network in a sampling.

    Args:
        paces: kept from pass to pass; updated by `finish`.
        agree: returns the largest of all ranks' values. Collective over the ranks of the sequence.
        new_event: creates an event on this rank's stream, with `enable_timing` and `blocking`.
    """

    def __init__(self, paces: Paces, agree: Callable[[float], float], new_event: Callable[[], Event]):
        self._paces, self._agree, self._new_event = paces, agree, new_event
        self._blocks: int | None = None
        self._split: Hashable = None
        self._events: collections.deque[Event] = collections.deque()
        self._first: Event | None = None
        self._last: Event | None = None
        self._entered = 0

    def enter(self, split: Hashable) -> int:
        """Waits until at most the agreed number of blocks is queued; returns that number. Called before each block."""
        if self._blocks is None:
            self._split = split
            self._blocks = blocks_within(self._agree(self._paces.get(split, math.inf)))
        event = self._new_event()
        event.record()
        self._first, self._last = self._first or event, event
        self._entered += 1
        self._events.append(event)
        if len(self._events) > self._blocks:
            self._events.popleft().synchronize()
        return self._blocks

    def finish(self) -> None:
        """Records the pace of the pass if it had more than one block. Called when the device has finished the pass."""
        if self._first is not None and self._last is not None and self._entered > 1:
            self._paces[self._split] = self._first.elapsed_time(self._last) / 1000 / (self._entered - 1)


def blocks_within(seconds_per_block: float) -> int:
    """Returns the number of blocks to queue; 0 while the pace is unknown (infinite)."""
    if seconds_per_block <= 0:
        return MOST
    return min(MOST, int(QUEUED_S / seconds_per_block))
