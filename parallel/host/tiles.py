"""Runs a VAE's tiles on the workers: several tiles are in flight, and results are returned in order."""

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
"""Names of the segments that hold inputs and outputs of tiles in flight."""
_WINDOW = 3
"""Number of tiles in flight per rank: being computed, waiting to be computed, waiting to be blended."""
ADVICE = "Use a smaller tile_size or temporal_size"


@dataclass(frozen=True, slots=True)
class Tile:
    """One call of the VAE.

    Attributes:
        shape: shape of its input.
        out_elements: maximum number of elements of its output.
        make: returns its input, on the CPU; called when the tile is sent.
    """

    shape: tuple[int, ...]
    out_elements: int
    make: Callable[[], Tensor]


@dataclass(slots=True)
class TileFigures:
    """Memory and traffic of a run of tiles."""

    tiles: int
    rank_bytes: list[int]
    """Maximum memory that each rank reported after a tile."""
    bytes_sent: int = 0
    """Bytes of tile inputs sent to the workers."""
    bytes_back: int = 0
    """Bytes of the results of finished tiles."""


class TileRun:
    """All tiles of one picture or video; for a single use, inside `group.tasks()`.

    A tile in flight has one slot of shared memory for its input and one for its output. The lowest free slots are
    reused first, so memory is touched only for as many tiles as are in flight at the same time.

    Args:
        group: group whose ranks hold the VAE.
        vae: name of the VAE in the workers.
        direction: `decode` or `encode`.
        tiles: tiles in the order in which `take` returns them.
        dtype: dtype of the inputs.
        on_progress: called with the number of finished tiles and of all tiles.
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
        """Returns the next tile's result, in the VAE's dtype; it is valid until the next call.

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
        """Returns the memory of the slots to the system."""
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
            # Keep the order of strides: with another memory format, convolutions return other bits.
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
