"""One page of shared words through which the host stops and monitors a running step without a message.

The ranks must agree on where to stop: if a rank stops before a block that a peer enters, the peer waits forever in that
block's collective. So only the *leader* reads the host's cancel word. At the start of block b it publishes "stop at
block b + 1 + run-ahead" before it joins block b's collectives. The other ranks read that word at the start of each
block. None can start block b + 1 before block b's collectives are complete, and these need the leader, which has
published by then. Hence all ranks stop at the same block, without a further collective. Groups of ranks that work on
different samples have a word each.

`run-ahead` is the number of blocks by which a rank's host code may be ahead of its device (0 on a CPU). On CUDA,
launches return at once, so before block b a rank waits until its device has finished block b − 1 − run-ahead, and then
reads the word. All ranks of a group use the same number R throughout a pass (`worker.run_ahead`); correctness rests on
this. A rank that reads the word before block c has finished block c − 1 − R, whose collectives needed the leader's host
code; so the leader had checked for Cancel, and published if necessary, before every block up to c − 1 − R. If it
publishes at block b, each rank sees the word from c = b + 1 + R on, which is the published block. A pass ends with all
of its work finished, so R may change from pass to pass. When the host requests Cancel, the leader's device is at block
b − 1 − R at the earliest, hence Cancel takes effect within 2 + 2R blocks: with R = 0, the current block and the next.
"""

from __future__ import annotations

from .shared import Segment

SIZE = 4096
_CANCEL, _STOP_AT, _BEATS = 0, 8, 256
"""Indices: the host's cancel word; first word with a group's stopping block; first word with a rank's signs of life."""
MAX_RANKS = _BEATS - _STOP_AT
_NEVER = 2**62


class ControlPage:
    """Control words, as mapped by the host or by a worker."""

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
        """Clears the cancel request, the stopping blocks and the signs of life. Host only, before a call."""
        self._words[_CANCEL] = 0
        for rank in range(world_size):
            self._words[_STOP_AT + rank] = _NEVER
            self._words[_BEATS + rank] = 0

    def request_cancel(self) -> None:
        """Asks all ranks to stop as soon as they can agree on a block. Host only."""
        self._words[_CANCEL] = 1

    @property
    def cancel_requested(self) -> bool:
        return self._words[_CANCEL] != 0

    def should_stop(self, block: int, *, group: int, leader: bool, run_ahead: int) -> bool:
        """Returns True if the rank must stop before `block`. Worker only, at the start of each block.

        Args:
            block: number of the block, which increases by one through a step.
            group: number of the group of ranks that share a sequence; each group stops independently.
            leader: True on the one rank of the group that reads the cancel request and publishes the stopping block.
            run_ahead: blocks by which host code may be ahead of the device; equal on all ranks of the group.
        """
        if leader and self._words[_CANCEL] and self._words[_STOP_AT + group] == _NEVER:
            self._words[_STOP_AT + group] = block + 1 + run_ahead
        return block >= self._words[_STOP_AT + group]

    def beat(self, rank: int) -> None:
        """Gives a sign of life. Worker only."""
        self._words[_BEATS + rank] += 1

    def beats(self, world_size: int) -> tuple[int, ...]:
        """Returns the number of signs of life of each rank since the call began. Host only."""
        return tuple(self._words[_BEATS : _BEATS + world_size])

    def close(self) -> None:
        self._words.release()
        self._segment.close()
