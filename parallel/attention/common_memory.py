"""All-to-all exchanges between CPU processes of one machine, through shared memory."""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from ..mesh import COLLECTIVE_TIMEOUT
from .exchange import PARTS, Coming, Joined, Parcel, Pieces

_HEADER = 64 << 10
_TABLE = 4096
_SLOT = 4 << 30
"""Bytes of address space for one message; only pages that are written take memory."""
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Flag that `mmap` defines since Python 3.13; the fallback is its value on Linux x86."""
_SPIN_S = 0.002
_SLEEP_S = 0.0001
_LAST_RESORT_S = COLLECTIVE_TIMEOUT.total_seconds()


class CommonMemory:
    """Memory mapped by all CPU ranks of a world, with one word per channel and two message slots for each rank.

    A slot begins with a table of the offsets, in elements, at which each receiver's piece starts. A rank joins the
    pieces that it receives in private memory, which stays mapped: the first touch of a page costs more than all copying
    of its bytes.

    Args:
        descriptor: file descriptor of the same, initially empty file on all ranks; the caller may close it.
        rank: rank of this process.
        world_size: number of ranks that map the file.
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
        self._own = mmap.mmap(-1, _SLOT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        with suppress(OSError):  # a kernel without huge pages
            self._own.madvise(mmap.MADV_HUGEPAGE)

    @staticmethod
    def supported() -> bool:
        """Returns True if the writes of one process become visible to another in order, without barriers."""
        return platform.system() == "Linux" and platform.machine() == "x86_64"

    def table(self, rank: int, number: int) -> memoryview:
        """Returns the table of the slot that holds message `number` of `rank`."""
        return self._tables[2 * rank + number % 2]

    def elements(self, rank: int, number: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Returns `count` elements, from element `start` on, of the slot that holds message `number` of `rank`."""
        return _view(
            self._map, _HEADER + (2 * rank + number % 2) * _SLOT + _TABLE + start * dtype.itemsize, count, dtype
        )

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns a view of this rank's private memory, which every call reuses from its start."""
        return _view(self._own, 0, count, dtype)

    def release(self) -> None:
        """Returns the memory of this rank's slots and its private memory to the system; between exchanges only."""
        self._map.madvise(mmap.MADV_REMOVE, _HEADER + 2 * self.rank * _SLOT, 2 * _SLOT)
        self._own.madvise(mmap.MADV_DONTNEED)


def _view(memory: mmap.mmap, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)


class CommonMemoryExchange:
    """All-to-all between CPU ranks through their `CommonMemory`: each byte is written once and read once.

    In every exchange a rank waits for all others. A rank that has finished exchange n + 1 therefore knows that all
    ranks have finished exchange n and have read what it sent there: two slots suffice, without acknowledgements. The
    piece that a rank sends to itself bypasses the slots.

    Args:
        memory: the world's common memory.
        channel: number of the group, the same on all its ranks and unique among the groups of these ranks.
        ranks: world ranks of the group, including this one.
    """

    def __init__(self, memory: CommonMemory, channel: int, ranks: Sequence[int]):
        self.memory = memory
        self._ranks = list(ranks)
        self.position = self._ranks.index(memory.rank)
        """Index of this rank in the group."""
        self._words = [channel * memory.world_size + rank for rank in ranks]
        assert max(self._words) < len(memory.words) and len(self._ranks) < _TABLE // 8
        self._number = 0

    @property
    def name(self) -> str:
        """Name that is the same on all ranks of the group and differs from other groups' names."""
        return f"common memory of ranks {self._ranks}, word {self._words[0]}"

    @property
    def launched(self) -> int:
        """Number of exchanges that this rank has launched."""
        return self._number

    @staticmethod
    def fits(nbytes: int) -> bool:
        """Returns True if a message of `nbytes` bytes can be sent."""
        return nbytes <= _SLOT - _TABLE

    def pack(self, widths: Sequence[int], rows: Sequence[int], like: Tensor) -> Parcel:
        return _InSlot(self, widths, rows, like.dtype)

    def start(self, whole: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pieces:
        pieces = whole.reshape(-1).split(list(sent))
        for i, target in enumerate(self.slot(sent, whole.dtype)):
            if i != self.position:
                target.copy_(pieces[i])
        arrived = self.publish(received, whole.dtype)
        return Coming(
            arrived.wait, lambda: [pieces[i] if i == self.position else x for i, x in enumerate(arrived.read())]
        )

    def slot(self, sent: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Returns the pieces of the next message, to be filled, one for each rank; this rank's own is empty."""
        memory, number = self.memory, self._number + 1
        table = memory.table(memory.rank, number)
        sizes = [0 if i == self.position else size for i, size in enumerate(sent)]
        for i, start in enumerate(accumulate(sizes, initial=0)):
            table[i] = start
        return list(memory.elements(memory.rank, number, 0, sum(sizes), dtype).split(sizes))

    def publish(self, received: Sequence[int], dtype: torch.dtype) -> Pieces:
        """Lets the other ranks read the message in the slot. Of the pieces received, this rank's own is empty."""
        self._number += 1
        self.memory.words[self._words[self.position]] = self._number
        return Coming(partial(self._wait_for, self._number), partial(self._read, self._number, received, dtype))

    def _wait_for(self, number: int) -> None:
        words = self.memory.words
        for rank, word in zip(self._ranks, self._words, strict=True):
            if words[word] < number and not _wait(words, word, number):
                raise RuntimeError(f"rank {rank} has not sent its part of exchange {number} in {_LAST_RESORT_S:g} s")

    def _read(self, number: int, received: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        pieces = []
        for rank, count in zip(self._ranks, received, strict=True):
            start, end = self.memory.table(rank, number)[self.position : self.position + 2]
            expected = 0 if rank == self.memory.rank else count
            assert end - start == expected, f"rank {rank} sent {end - start} elements, the plan has {expected}"
            pieces.append(self.memory.elements(rank, number, start, expected, dtype))
        return pieces


class _InSlot:
    """Parcel whose pieces for other ranks lie in the slot; this rank's own piece lies where it will be read."""

    def __init__(self, exchange: CommonMemoryExchange, widths: Sequence[int], rows: Sequence[int], dtype: torch.dtype):
        self._exchange = exchange
        here = exchange.position
        self._received = [PARTS * each * widths[here] for each in rows]
        self._room = exchange.memory.room(sum(self._received), dtype).view(PARTS, sum(rows), widths[here])
        self._places = self._room.split(list(rows), dim=1)
        slot = exchange.slot([PARTS * rows[here] * width for width in widths], dtype)
        self.pieces: Sequence[Tensor] = [
            self._places[here] if i == here else piece.view(PARTS, rows[here], width)
            for i, (piece, width) in enumerate(zip(slot, widths, strict=True))
        ]

    def send(self) -> Joined:
        arrived = self._exchange.publish(self._received, self._room.dtype)

        def read() -> Tensor:
            for i, (place, piece) in enumerate(zip(self._places, arrived.read(), strict=True)):
                if i != self._exchange.position:
                    place.copy_(piece.view(place.shape))
            return self._room

        return Coming(arrived.wait, read)


def _wait(words: memoryview, word: int, number: int) -> bool:
    """Waits until `words[word]` reaches `number`: yields the core between checks, and after `_SPIN_S` sleeps instead.

    The host terminates ranks whose peers have died.

    Returns:
        False if `_LAST_RESORT_S` have passed.
    """
    began = time.perf_counter()
    while words[word] < number:
        waited = time.perf_counter() - began
        if waited < _SPIN_S:
            os.sched_yield()
        elif waited < _LAST_RESORT_S:
            time.sleep(_SLEEP_S)
        else:
            return False
    return True
