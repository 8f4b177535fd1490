"""One page of shared words, by which a running step can be stopped and watched without a message.

Stopping must be agreed: a rank that stops before a block while a peer enters it leaves the peer waiting forever in
that block's collective. So only the *leader* looks at the host's wish. At the start of block b it publishes "stop at
block b + 1 + run-ahead" before it joins block b's collectives. Another rank reads that word at the start of its blocks.
It cannot start block b + 1 before block b's collectives are complete, which need the leader, who has published by
then; hence all ranks stop at the same block, and it costs no collective. Groups of ranks that
work on different samples have a word each.

`run-ahead` is how many blocks a rank's host code may be ahead of its device (0 on a CPU): on CUDA, launches return at
once, so before block b a rank waits until its device has finished block b − 1 − run-ahead, and then looks. It is the
same number R on all ranks of a group throughout a pass (`worker.run_ahead`), and that is what safety takes: a rank that
looks before block c has finished block c − 1 − R, whose collectives needed the leader's host code; so the leader had
looked, and published if it was to, before every block up to c − 1 − R. If it publishes at block b, each rank sees it
from c = b + 1 + R on, which is the block that it says. A pass ends with all of its work finished, so the number may
change from pass to pass. When the host asks, the leader's device is at block b − 1 − R at the earliest, hence Cancel
takes effect within 2 + 2R blocks: with R = 0, the block that runs and the next one.
"""

from __future__ import annotations

from .shared import Segment

SIZE = 4096
_CANCEL, _STOP_AT, _BEATS = 0, 8, 256
"""Word of the host's wish; first of the words that say where each group stops; first of the ranks' signs of life."""
MAX_RANKS = _BEATS - _STOP_AT
_NEVER = 2**62


class ControlPage:
    """The words, seen from the host or from a worker."""

    def __init__(self, segment: Segment):
        self._segment = segment
        self._words = segment.words()

    @classmethod
    def create(cls) -> ControlPage:
        page = cls(Segment.create("control", SIZE))
        page.reset(0)
        return page

    def fileno(self) -> int:
        return self._segment.fileno()

    def reset(self, world_size: int) -> None:
        """Host, before a call: no wish to stop, no progress."""
        self._words[_CANCEL] = 0
        for rank in range(world_size):
            self._words[_STOP_AT + rank] = _NEVER
            self._words[_BEATS + rank] = 0

    def request_cancel(self) -> None:
        """Host: stop as soon as all ranks can."""
        self._words[_CANCEL] = 1

    @property
    def cancel_requested(self) -> bool:
        return self._words[_CANCEL] != 0

    def should_stop(self, block: int, *, group: int, leader: bool, run_ahead: int) -> bool:
        """Worker, at the start of `block`; `block` counts up by one through a step.

        `group` numbers the ranks that share a sequence; groups stop each by themselves.
        """
        if leader and self._words[_CANCEL] and self._words[_STOP_AT + group] == _NEVER:
            self._words[_STOP_AT + group] = block + 1 + run_ahead
        return block >= self._words[_STOP_AT + group]

    def beat(self, rank: int) -> None:
        """Worker: a sign of life."""
        self._words[_BEATS + rank] += 1

    def beats(self, world_size: int) -> tuple[int, ...]:
        """Host: each rank's signs of life since the call began."""
        return tuple(self._words[_BEATS : _BEATS + world_size])

    def close(self) -> None:
        self._words.release()
        self._segment.close()
