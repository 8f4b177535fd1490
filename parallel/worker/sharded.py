"""A network's weights, shared out among the ranks of a sequence: each has an equal part of each block's bytes.

FSDP2 takes one dtype in a block, and restores quantised tensors to floats before it cuts them. Here bytes are cut and
gathered, by one all-gather for each block. The ranks run the same blocks in the same order, whatever that is, and
wherever Cancel stops them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attention.traffic import Traffic
from ..wire.plain import plain_tensors
from ..wire.shared import ALIGNMENT
from .homes import Home, Order, Progress, Units, told
from .packed import Packed, Weight


class Sharded(Home):
    """A part of the bytes of each block, and of those that belong to none.

    Args:
        group: the ranks that share a sequence.
        ahead: gather the next block while one runs. By default on CUDA: a CPU has nothing to do it with.
    """

    def __init__(
        self,
        rest: Sequence[Weight],
        blocks: Mapping[nn.Module, Sequence[Weight]],
        device: torch.device,
        progress: Progress,
        *,
        group: dist.ProcessGroup,
        ahead: bool | None = None,
    ):
        self._device, self._group = device, group
        self._rank, self._ranks = group.rank(), group.size()
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._units = Units(rest, blocks, self._bring)
        self._order = Order(len(blocks))
        self._mine = [
            torch.zeros(_part(unit, self._ranks), dtype=torch.uint8, device=device) for unit in self._units.all
        ]
        self._gathered: dict[int, dist.Work | None] = {}
        """Blocks whose weights this rank has, or will have when the work, if any, is done."""
        self._traffic = Traffic()
        for weight in told(self._units.weights, progress):
            self.put(weight.name, plain_tensors(weight.value))
            weight.clear()

    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        number, weight = self._units.find(name)
        mine = self._mine[number]
        self._units.all[number].write(weight, pieces, mine, first=self._rank * len(mine))

    @property
    def nbytes(self) -> int:
        return sum(len(mine) for mine in self._mine)

    @contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        self._traffic = traffic or Traffic()
        self._order.begin()
        rest = len(self._units.blocks)
        try:
            self._gather(rest, wait=True)
            yield
        finally:
            for number in list(self._gathered):
                self._put_away(number)
            if self._device.type == "cpu":  # else the allocator keeps what was gathered for the next time
                ctypes.CDLL(None).malloc_trim(0)

    def close(self) -> None:
        self._units.close()

    def _bring(self, number: int) -> None:
        if self.skipping():
            return
        ahead = self._order.after(number) if self._ahead else None
        rest = len(self._units.blocks)
        for other in self._gathered.keys() - {number, ahead, rest}:
            self._put_away(other)
        if number not in self._gathered:
            self._gather(number, wait=True)
        self._arrive(number)
        if ahead is not None and ahead not in self._gathered:
            self._gather(ahead, wait=False)

    def _gather(self, number: int, *, wait: bool) -> None:
        unit, mine = self._units.all[number], self._mine[number]
        whole = torch.empty(self._ranks * len(mine), dtype=torch.uint8, device=self._device)
        with self._traffic.waiting():
            self._gathered[number] = dist.all_gather_into_tensor(whole, mine, self._group, async_op=not wait)
        unit.land(whole)

    def _arrive(self, number: int) -> None:
        if (work := self._gathered[number]) is not None:
            with self._traffic.waiting():
                work.wait()
            self._gathered[number] = None

    def _put_away(self, number: int) -> None:
        self._arrive(number)
        del self._gathered[number]
        self._units.all[number].leave()


def _part(unit: Packed, ranks: int) -> int:
    """Bytes of each rank's part; what a unit lacks for equal ones is padding behind it."""
    lines = -(-unit.size // ALIGNMENT)
    return -(-lines // ranks) * ALIGNMENT
