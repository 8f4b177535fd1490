"""A network's weights, shared out among the ranks of a sequence: each has an equal part of each block's bytes.

FSDP2 takes one dtype in a block, and restores quantised tensors to floats before it cuts them. Here bytes are cut and
gathered, by one all-gather for each block. The ranks run the same blocks in the same order, whatever that is, and
wherever Cancel stops them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..attention.traffic import Traffic
from ..wire.shared import ALIGNMENT
from .homes import Blocks, Brought, Progress
from .packed import Packed, Weight


class Sharded(Brought):
    """A part of the bytes of each block, and of those that belong to none.

    Args:
        group: the ranks that share a sequence.
        ahead: gather the next block while one runs. By default on CUDA: a CPU has nothing to do it with.
    """

    def __init__(
        self,
        rest: Sequence[Weight],
        blocks: Blocks,
        device: torch.device,
        progress: Progress,
        *,
        group: dist.ProcessGroup,
        ahead: bool | None = None,
    ):
        super().__init__(rest, blocks, device)
        self._group = group
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._rest = len(blocks)
        """The unit that belongs to no block."""
        self._gathered: dict[int, dist.Work | None] = {}
        """Units whose weights this rank has, or will have when the work, if any, is done."""
        self._traffic = Traffic()
        sizes = [_part(unit, group.size()) for unit in self._units]
        self._write_all(
            [(torch.zeros(size, dtype=torch.uint8, device=device), group.rank() * size) for size in sizes], progress
        )

    @property
    def nbytes(self) -> int:
        return sum(len(mine) for mine, _ in self._parts)

    @contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        self._traffic = traffic or Traffic()
        self._order.begin()
        try:
            self._gather(self._rest, wait=True)
            yield
        finally:
            for number in list(self._gathered):
                self._put_away(number)
            if self._device.type == "cpu":  # else the allocator keeps what was gathered for the next time
                ctypes.CDLL(None).malloc_trim(0)

    def _bring(self, number: int, following: int | None) -> None:
        ahead = following if self._ahead else None
        for other in self._gathered.keys() - {number, ahead, self._rest}:
            self._put_away(other)
        if number not in self._gathered:
            self._gather(number, wait=True)
        self._arrive(number)
        if ahead is not None and ahead not in self._gathered:
            self._gather(ahead, wait=False)

    def _gather(self, number: int, *, wait: bool) -> None:
        mine, _ = self._parts[number]
        whole = torch.empty(self._group.size() * len(mine), dtype=torch.uint8, device=self._device)
        with self._traffic.waiting():
            self._gathered[number] = dist.all_gather_into_tensor(whole, mine, self._group, async_op=not wait)
        self._units[number].land(whole)

    def _arrive(self, number: int) -> None:
        if (work := self._gathered[number]) is not None:
            with self._traffic.waiting():
                work.wait()
            self._gathered[number] = None

    def _put_away(self, number: int) -> None:
        self._arrive(number)
        del self._gathered[number]
        self._units[number].leave()


def _part(unit: Packed, ranks: int) -> int:
    """Bytes of each rank's part; what a unit lacks for equal ones is padding behind it."""
    lines = -(-unit.size // ALIGNMENT)
    return -(-lines // ranks) * ALIGNMENT
