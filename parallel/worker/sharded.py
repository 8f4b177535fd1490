"""A network's weights, sharded over the ranks of a sequence: each holds an equal part of each block's bytes.

FSDP2 requires one dtype in a block, and dequantises tensors to floats before it shards them. Here bytes are sharded,
and gathered by one all-gather for each block. All ranks run the same blocks in the same order, whatever the order is
and wherever Cancel stops them.
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
    """A shard of the bytes of each block, and of the weights outside the blocks.

    Args:
        group: the ranks that share a sequence.
        ahead: whether to gather the next block while one runs. By default only on CUDA: a CPU has nothing spare for it.
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
        """Index of the unit that holds the weights outside the blocks."""
        self._gathered: dict[int, dist.Work | None] = {}
        """Maps each unit that is gathered, or being gathered, to its pending all-gather; None if it is complete."""
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
            if self._device.type == "cpu":  # else the allocator keeps the gathered bytes for the next time
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
    """Returns the bytes of each rank's shard; padding at the end of the unit makes all shards equal."""
    lines = -(-unit.size // ALIGNMENT)
    return -(-lines // ranks) * ALIGNMENT
