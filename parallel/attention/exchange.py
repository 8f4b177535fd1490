"""All-to-all exchanges: through `torch.distributed`, or between processes of one machine through memory they share."""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Arrival(Protocol):
    """An exchange under way. One of the two may be called, once."""

    def pieces(self) -> list[Tensor]:
        """Waits; what each rank sent, flat, by rank. To be read before the next exchange is started."""

    def joined(self) -> Tensor:
        """Waits; all pieces one after the other."""


class Exchange(Protocol):
    """All-to-all of flat pieces whose sizes every rank knows."""

    def buffer(self, count: int, like: Tensor) -> Tensor:
        """Room for what will be sent next: `count` elements, with dtype and device of `like`."""

    def start(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        """Starts to send the pieces of `send`, one after the other and of `sent` elements each, to the ranks in order.

        Args:
            received: elements that each rank sends to this one.
        """


class CollectiveExchange:
    """By `all_to_all_single`, asynchronously.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def buffer(self, count: int, like: Tensor) -> Tensor:
        return like.new_empty(count)

    def start(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        return _Collective(send.reshape(-1), sent, received, self._group)


class _Collective:
    def __init__(self, send: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup):
        self._send = send  # must outlive the transfer
        self._sizes = list(received)
        self._received = send.new_empty(sum(received))
        self._work = dist.all_to_all_single(self._received, send, self._sizes, list(sent), group=group, async_op=True)

    def pieces(self) -> list[Tensor]:
        return list(self.joined().split(self._sizes))

    def joined(self) -> Tensor:
        self._work.wait()
        return self._received


_HEADER = 64 << 10
_TABLE = 4096
_SLOT = 4 << 30
"""Bytes of address space for one message; memory is taken only for what is written."""
_SPIN_S = 0.002
_SLEEP_S = 0.0001


class CommonMemory:
    """Memory that the CPU ranks of a world map: for each rank one word per channel, and two slots for messages.

    A slot begins with a table: where each receiver's piece starts, in elements.

    Args:
        descriptor: of a file that is empty at first, the same for all ranks; the caller may close it.
        rank: this process.
        world_size: ranks that map the file.
    """

    def __init__(self, descriptor: int, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        size = _HEADER + 2 * world_size * _SLOT
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        whole = memoryview(self._map)
        self.words = whole[:_HEADER].cast("q")
        starts = (_HEADER + i * _SLOT for i in range(2 * world_size))
        self._tables = [whole[start : start + _TABLE].cast("q") for start in starts]

    @staticmethod
    def supported() -> bool:
        """Whether what one process writes becomes visible to another in order, without barriers."""
        return platform.system() == "Linux" and platform.machine() == "x86_64"

    def table(self, rank: int, number: int) -> memoryview:
        """Of the slot that holds message `number` of `rank`."""
        return self._tables[2 * rank + number % 2]

    def elements(self, rank: int, number: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of that slot, from element `start` on."""
        if not count:
            return torch.empty(0, dtype=dtype)
        offset = _HEADER + (2 * rank + number % 2) * _SLOT + _TABLE + start * dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def release(self) -> None:
        """Gives the memory of this rank's slots back to the system; between exchanges only."""
        self._map.madvise(mmap.MADV_REMOVE, _HEADER + 2 * self.rank * _SLOT, 2 * _SLOT)


class CommonMemoryExchange:
    """Between CPU ranks, through their `CommonMemory`: each byte is written once and read once.

    In every exchange a rank waits for all others. So one that has finished exchange n + 1 knows that all have finished
    n and read what it sent in n: two slots are enough, and nothing is acknowledged.

    Args:
        memory: the world's common memory.
        channel: a number that no other group of these ranks has, the same on all of them.
        ranks: the group's ranks of the world, this one among them.
    """

    def __init__(self, memory: CommonMemory, channel: int, ranks: Sequence[int]):
        self._memory = memory
        self._ranks = list(ranks)
        self._position = self._ranks.index(memory.rank)
        self._words = [channel * memory.world_size + rank for rank in ranks]
        assert max(self._words) < len(memory.words) and len(self._ranks) < _TABLE // 8
        self._number = 0

    @staticmethod
    def fits(nbytes: int) -> bool:
        """Whether a message of so many bytes can be sent."""
        return nbytes <= _SLOT - _TABLE

    def buffer(self, count: int, like: Tensor) -> Tensor:
        return self._memory.elements(self._memory.rank, self._number + 1, 0, count, like.dtype)

    def start(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        memory = self._memory
        buffer = self.buffer(send.numel(), send)
        self._number += 1
        if send.data_ptr() != buffer.data_ptr():
            buffer.view(send.shape).copy_(send)
        table = memory.table(memory.rank, self._number)
        for i, start in enumerate(accumulate(sent, initial=0)):
            table[i] = start
        memory.words[self._words[self._position]] = self._number
        return _InCommonMemory(self, self._number, received, send.dtype)

    def wait_for(self, number: int, received: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """The pieces of message `number`, in the senders' slots."""
        words = self._memory.words
        pieces = []
        for rank, word, count in zip(self._ranks, self._words, received, strict=True):
            if words[word] < number:
                _wait(words, word, number)
            start, end = self._memory.table(rank, number)[self._position : self._position + 2]
            assert end - start == count, f"rank {rank} sent {end - start} elements, the plan has {count}"
            pieces.append(self._memory.elements(rank, number, start, count, dtype))
        return pieces


def _wait(words: memoryview, word: int, number: int) -> None:
    """Gives the core away again and again; after a while sleeps, too. The host ends ranks whose peers have died."""
    began = time.perf_counter()
    while words[word] < number:
        if time.perf_counter() - began < _SPIN_S:
            os.sched_yield()
        else:
            time.sleep(_SLEEP_S)


class _InCommonMemory:
    def __init__(self, exchange: CommonMemoryExchange, number: int, received: Sequence[int], dtype: torch.dtype):
        self._wait = partial(exchange.wait_for, number, received, dtype)

    def pieces(self) -> list[Tensor]:
        return self._wait()

    def joined(self) -> Tensor:
        return torch.cat(self._wait())
