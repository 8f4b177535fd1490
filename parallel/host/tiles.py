"""The way of a VAE's tiles through the workers: handed out ahead, handed back in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vae.schedule import Schedule
from ..wire import messages
from ..wire.shared import TensorRef, dtype_name, lay_out
from ..wire.typed import from_plain
from .calls import Call, Poll, Progress
from .group import WorkerGroup

IN, OUT = "tiles in", "tiles out"
"""Names of the segments that hold tiles on their way."""
_WINDOW = 3
"""Tiles on their way for each rank: computed, waiting to be computed, waiting to be blended."""
ADVICE = "Use a smaller tile_size or temporal_size"


@dataclass(frozen=True, slots=True)
class Tile:
    """One call of the VAE.

    Attributes:
        shape: of what goes in.
        out_elements: at most so many come out.
        make: gives what goes in, on the CPU, when its turn has come.
    """

    shape: tuple[int, ...]
    out_elements: int
    make: Callable[[], Tensor]


@dataclass(slots=True)
class TileFigures:
    """What a run has cost."""

    tiles: int
    rank_bytes: list[int]
    """The most memory that each rank said it used after a tile."""
    bytes_sent: int = 0
    """To the workers."""
    bytes_back: int = 0
    """Of finished tiles."""


class TileRun:
    """All tiles of one picture or video; to be used once, inside `group.tasks()`.

    A tile in flight has a slot of shared memory for what goes in and one for what comes out, and the lowest free slots
    are used again, so no more memory is touched than tiles are on their way at the same time.

    Args:
        group: its ranks hold the VAE.
        vae: name of the VAE in the workers.
        direction: `decode` or `encode`.
        tiles: in the order in which they will be taken.
        dtype: of what goes in.
        on_progress: told how many tiles are finished, of all.
    """

    def __init__(
        self,
        group: WorkerGroup,
        vae: str,
        direction: str,
        tiles: Sequence[Tile],
        dtype: torch.dtype,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ):
        self.figures = TileFigures(len(tiles), [0] * group.layout.world_size)
        self._group = group
        self._vae = vae
        self._direction = direction
        self._tiles = tiles
        self._dtype = dtype
        self._poll = poll
        self._on_progress = on_progress
        world = group.layout.world_size
        window = min(_WINDOW * world, len(tiles))
        self._schedule = Schedule([math.prod(t.shape) for t in tiles], group.layout.speeds, window)
        self._in_size = _aligned(max(math.prod(tile.shape) for tile in tiles) * dtype.itemsize)
        self._out_size = _aligned(max(tile.out_elements for tile in tiles) * torch.float32.itemsize)
        self._in = group.memory.segment(IN, window * self._in_size)
        self._out = group.memory.segment(OUT, window * self._out_size)
        self._free_in = list(range(window))
        self._free_out = list(range(window))
        self._flying: dict[int, tuple[Call, int, int]] = {}
        self._arrived: dict[int, tuple[TensorRef, int]] = {}
        self._taken = 0
        self._finished = 0
        self._lent: int | None = None
        group.call(messages.BeginTiles(vae=vae), poll=poll)

    def take(self) -> Tensor:
        """The next tile's result, in the VAE's dtype; it is overwritten after the next call.

        Raises:
            WorkerError: a worker died or failed; `WorkerOutOfMemoryError` if no rank has the memory for a tile.
        """
        if self._lent is not None:
            self._free_out.append(self._lent)
            self._lent = None
        while True:
            self._collect()
            self._hand_out()
            if self._taken in self._arrived:
                ref, self._lent = self._arrived.pop(self._taken)
                self._taken += 1
                return self._out.tensor(ref)
            self._group.wait_for(self._any_reply, self._poll)

    def close(self) -> None:
        """Gives the memory of the slots back."""
        self._in.clear()
        self._out.clear()

    def _any_reply(self) -> bool:
        return any(task.answered for task, _, _ in self._flying.values())

    def _hand_out(self) -> None:
        while (choice := self._schedule.next(self._taken)) is not None:
            tile, rank = choice
            slot_in, slot_out = min(self._free_in), min(self._free_out)
            self._free_in.remove(slot_in)
            self._free_out.remove(slot_out)
            x = self._tiles[tile].make()
            self.figures.bytes_sent += x.nbytes
            place = TensorRef(IN, slot_in * self._in_size, (x.numel(),), dtype_name(self._dtype))
            # The order of strides is kept, because convolutions of another memory format give other bits.
            stride = torch.empty_like(x, device="meta").stride()
            self._in.tensor(place).as_strided(x.shape, stride).copy_(x)
            message = messages.Tile(
                vae=self._vae,
                direction=self._direction,
                x=place,
                shape=list(x.shape),
                stride=list(stride),
                out=messages.Room(segment=OUT, offset=slot_out * self._out_size, size=self._out_size),
            )
            self._flying[tile] = (self._group.submit(rank, message), slot_in, slot_out)

    def _collect(self) -> None:
        for tile, (task, slot_in, slot_out) in list(self._flying.items()):
            if not task.answered:
                continue
            ((rank, reply),) = task.replies.items()
            del self._flying[tile]
            self._free_in.append(slot_in)
            rank_bytes = self.figures.rank_bytes
            rank_bytes[rank] = max(rank_bytes[rank], reply.memory.used if reply.memory else 0)
            if reply.error is not None:
                self._free_out.append(slot_out)
                if reply.error.out_of_memory and self._schedule.out_of_memory(tile, rank):
                    continue
                raise self._group.task_error(task, ADVICE)
            self._schedule.finished(tile, rank, reply.result["seconds"])
            ref = from_plain(TensorRef, reply.result["out"])
            self.figures.bytes_back += ref.nbytes
            self._arrived[tile] = (ref, slot_out)
            self._finished += 1
            if self._on_progress is not None:
                self._on_progress(self._finished, len(self._tiles))


def _aligned(nbytes: int) -> int:
    return lay_out("", [((nbytes,), torch.uint8)])[1]
