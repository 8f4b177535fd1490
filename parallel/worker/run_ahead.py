"""How far a rank's host code runs ahead of its CUDA device, in blocks, bounded by the time that they take.

Launches return at once. Queued work hides their cost, and delays Cancel: what is queued runs. So at most about 50 ms of
blocks are queued, by the pace of the last pass of the same split: none where a block takes longer than that, up to
eight where blocks are short. Waiting for the device before each long block costs one launch, some 0.1 ms.

All ranks of a sequence run ahead by the same number of blocks, on which Cancel's agreement rests (`wire.control`):
before the first block of a pass they agree on the slowest rank's pace. It is the only exchange, once per pass; a pace
that only one rank knows is no rank's.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable

from torch.cuda import Event

QUEUED_S = 0.05
"""Seconds of queued work, at most."""
MOST = 8
"""Blocks of queued work, at most; more hide no more."""

Paces = dict[Hashable, float]
"""Seconds per block on the device, of each split's last pass."""


class RunAhead:
    """The blocks of one pass: of one step, or of one pass through the network in a sampling.

    Args:
        paces: kept from pass to pass; changed by `finish`.
        agree: the largest of all ranks' values. Collective over the ranks of the sequence.
        new_event: makes an event on this rank's stream, with `enable_timing` and `blocking`.
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
        """Before each block: waits until at most the agreed number of blocks is queued, and returns that number."""
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
        """After the pass, when the device has done all of it: notes its pace, if it had more than one block."""
        if self._first is not None and self._last is not None and self._entered > 1:
            self._paces[self._split] = self._first.elapsed_time(self._last) / 1000 / (self._entered - 1)


def blocks_within(seconds_per_block: float) -> int:
    """Blocks to queue; none while the pace is unknown (infinite)."""
    if seconds_per_block <= 0:
        return MOST
    return min(MOST, int(QUEUED_S / seconds_per_block))
