"""The way of tiles through shared memory, with ranks that answer at once or run out of memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.errors import WorkerOutOfMemoryError
from parallel.host.calls import Call
from parallel.host.memory import GroupMemory
from parallel.host.tiles import Tile, TileRun
from parallel.wire import messages
from parallel.wire.shared import TensorRef
from parallel.wire.typed import to_plain

FULL = messages.Failure(
    type="OutOfMemoryError", message="", traceback="", expected=False, out_of_memory=True, resumable=True
)


class Ranks:
    """Stands for a group: a tile is doubled when somebody waits for it, the last one given first."""

    def __init__(self, world_size: int, room: Callable[[int], float] = lambda rank: float("inf")):
        self.layout = SimpleNamespace(world_size=world_size, speeds=(1.0,) * world_size)
        self.memory = GroupMemory()
        self.announced = False
        self.computed: list[int] = []
        self._room = room
        self._given: list[tuple[Call, messages.Tile]] = []

    def call(self, message: Any, **_: Any) -> None:
        self.announced = True

    def submit(self, rank: int, message: messages.Tile) -> Call:
        assert self.announced, "the workers do not know the shared memory"
        self._given.append((Call(len(self._given), message.name, (rank,)), message))
        return self._given[-1][0]

    def wait_for(self, condition: Callable[[], bool], poll: Any = None) -> None:
        while not condition():
            task, message = self._given.pop()
            (rank,), memory = task.ranks, messages.MemoryUse(used=5, free=None, cached=0)
            task.replies[rank] = messages.Reply(
                id=task.number, launched={}, memory=memory, **self._answer(rank, message)
            )

    def _answer(self, rank: int, message: messages.Tile) -> dict[str, Any]:
        place, room = message.x, message.out
        x = self.memory.segment(place.segment, 0).tensor(place).as_strided(message.shape, message.stride)
        if x.numel() > self._room(rank):
            return {"error": FULL}
        assert x.nbytes <= room.size
        self.computed.append(rank)
        ref = TensorRef(room.segment, room.offset, tuple(x.shape), "float32")
        self.memory.segment(ref.segment, 0).tensor(ref).copy_(x * 2)
        return {"result": {"seconds": x.numel() / 100, "out": to_plain(ref)}}

    def task_error(self, task: Call, advice: str) -> Exception:
        return WorkerOutOfMemoryError(advice, rank=task.ranks[0])


SHAPES = [(1, 4, 6, 6), (1, 4, 6, 2), (1, 4, 2, 6), (1, 4, 2, 2)] * 5


def make(number: int, shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1000 * number


def start(ranks: Ranks, told: list[tuple[int, int]] | None = None) -> TileRun:
    tiles = [Tile(shape, torch.Size(shape).numel(), lambda i=i, s=shape: make(i, s)) for i, shape in enumerate(SHAPES)]
    progress = None if told is None else lambda done, total: told.append((done, total))
    run = TileRun(ranks, "vae-1", "decode", tiles, torch.float32, on_progress=progress)
    return run


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_in_order_and_once(world_size):
    ranks, told = Ranks(world_size), []
    run = start(ranks, told)
    for number, shape in enumerate(SHAPES):
        assert torch.equal(run.take(), 2 * make(number, shape))
    assert told == [(n, len(SHAPES)) for n in range(1, len(SHAPES) + 1)]
    assert run.figures.bytes_back == run.figures.bytes_sent == sum(torch.Size(shape).numel() * 4 for shape in SHAPES)
    assert set(ranks.computed) == set(range(world_size)) and run.figures.rank_bytes == [5] * world_size


def test_a_tile_goes_to_a_rank_that_has_the_memory():
    ranks = Ranks(2, room=lambda rank: 100 if rank == 1 else float("inf"))  # a large tile has 144 elements
    run = start(ranks)
    for number, shape in enumerate(SHAPES):
        assert torch.equal(run.take(), 2 * make(number, shape))
    assert ranks.computed.count(1) > 3, "the small tiles are left to it"


def test_no_rank_has_the_memory():
    run = start(Ranks(2, room=lambda rank: 100))
    with pytest.raises(WorkerOutOfMemoryError, match="Use a smaller tile_size or temporal_size"):
        run.take()


def test_the_order_of_strides_travels_with_the_tile():
    """Pixels come with the channels last; convolutions of another memory format give other bits."""
    pixels = torch.randn(1, 8, 9, 3).movedim(-1, 1)[:, :, :6, 2:7]
    ranks = Ranks(1)
    sent: list[messages.Tile] = []
    submit = ranks.submit
    ranks.submit = lambda rank, message: (sent.append(message), submit(rank, message))[1]
    run = TileRun(ranks, "vae-1", "encode", [Tile(tuple(pixels.shape), 90, lambda: pixels)], torch.float32)
    assert torch.equal(run.take(), 2 * pixels)
    assert tuple(sent[0].stride) == (90, 1, 15, 3)
