"""The exchange through common memory, each rank a thread here."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.attention.common_memory import CommonMemory, CommonMemoryExchange

pytestmark = pytest.mark.skipif(not CommonMemory.supported(), reason="no common memory on this kind of machine")


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


def map_for(file: int, world: int) -> list[CommonMemory]:
    """The same file, mapped once for each rank."""
    return [CommonMemory(file, rank, world) for rank in range(world)]


def run(ranks: Sequence[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(rank) for rank in ranks]]


WORLDS = st.integers(1, 4)


def sizes(draw: st.DrawFn, world: int) -> list[int]:
    return draw(st.lists(st.integers(0, 9), min_size=world, max_size=world))


@st.composite
def exchanges(draw: st.DrawFn) -> list[tuple[bool, list[int], list[list[int]]]]:
    """For each exchange: is it packed, rows of each rank, and widths for each rank or sizes of the pieces."""
    world = draw(WORLDS)
    return [
        (draw(st.booleans()), sizes(draw, world), [sizes(draw, world) for _ in range(world)])
        for _ in range(draw(st.integers(1, 12)))
    ]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(exchanges=exchanges(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_piece_arrives_whole_and_in_order(exchanges, dtype):
    world = len(exchanges[0][1])
    descriptor = os.memfd_create("test")
    memory = map_for(descriptor, world)

    def value(number: int, sender: int, receiver: int, *shape: int) -> torch.Tensor:
        count = torch.arange(torch.Size(shape).numel()).view(shape)
        return (count + 100 * (number % 2) + 30 * sender + 7 * receiver).to(dtype)

    def rank(me: int) -> bool:
        exchange = CommonMemoryExchange(memory[me], 0, range(world))
        for number, (packed, rows, table) in enumerate(exchanges):
            if packed:
                widths = table[0]
                parcel = exchange.pack(widths, rows, torch.empty(0, dtype=dtype))
                for j, (piece, width) in enumerate(zip(parcel.pieces, widths, strict=True)):
                    piece.copy_(value(number, me, j, 3, rows[me], width))
                expected = [value(number, j, me, 3, rows[j], widths[me]) for j in range(world)]
                assert torch.equal(parcel.send()(), torch.cat(expected, dim=1))
            else:
                sent, received = table[me], [row[me] for row in table]
                send = [value(number, me, j, count) for j, count in enumerate(sent)]
                pieces = exchange.start(torch.cat(send), sent, received)()
                for j, (piece, count) in enumerate(zip(pieces, received, strict=True)):
                    assert torch.equal(piece, value(number, j, me, count))
        return True

    try:
        assert all(run([lambda me=me: rank(me) for me in range(world)]))
    finally:
        os.close(descriptor)


def test_groups_of_the_same_ranks_do_not_hear_each_other(file: int):
    """Meshes of different degrees use the same slots, one after the other."""
    memory = map_for(file, 4)

    def rank(me: int) -> list[list[float]]:
        pair = [me // 2 * 2, me // 2 * 2 + 1]
        rows = CommonMemoryExchange(memory[me], 0, pair)
        everyone = CommonMemoryExchange(memory[me], 1, range(4))
        heard = []
        for exchange, size in ((rows, 2), (everyone, 4), (everyone, 4), (rows, 2)):
            arrival = exchange.start(torch.full((size,), float(me)), [1] * size, [1] * size)
            heard.append(torch.cat(list(arrival())).tolist())
            barrier.wait()  # as between two steps
        return heard

    barrier = threading.Barrier(4)
    for me, heard in enumerate(run([lambda me=me: rank(me) for me in range(4)])):
        pair = [float(me // 2 * 2), float(me // 2 * 2 + 1)]
        assert heard == [pair, [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], pair]


def test_a_peer_with_another_plan_is_noticed(file: int):
    memory = map_for(file, 2)

    def rank(me: int, expected: int) -> object:
        exchange = CommonMemoryExchange(memory[me], 0, range(2))
        return exchange.start(torch.zeros(4), [2, 2], [expected, expected])()

    with pytest.raises(AssertionError, match="rank 1 sent 2 elements, the plan has 3"):
        run([lambda: rank(0, 3), lambda: rank(1, 2)])


def test_a_slow_peer_is_waited_for(file: int):
    memory = map_for(file, 2)
    late = threading.Event()

    def slow() -> object:
        late.wait()
        return CommonMemoryExchange(memory[1], 0, range(2)).start(torch.ones(2), [1, 1], [1, 1])()

    def quick() -> object:
        pieces = CommonMemoryExchange(memory[0], 0, range(2)).start(torch.zeros(2), [1, 1], [1, 1])
        threading.Timer(0.05, late.set).start()
        return pieces()

    for heard in run([quick, slow]):
        assert [piece.item() for piece in heard] == [0.0, 1.0]


def test_released_memory_goes_back_to_the_system(file: int):
    memory = map_for(file, 2)
    exchanges = [CommonMemoryExchange(memory[me], 0, range(2)) for me in range(2)]
    width = 1 << 20
    sent = 3 * width * 4  # bytes, of one row for one rank

    def rank(me: int) -> torch.Tensor:
        parcel = exchanges[me].pack([width, width], [1, 1], torch.empty(0))
        for piece in parcel.pieces:
            piece.fill_(me)
        return parcel.send()()

    for arrived in run([lambda me=me: rank(me) for me in range(2)]):
        assert torch.equal(arrived[:, :, 0], torch.tensor([[0.0, 1.0]]).expand(3, 2))
    assert taken(file) >= 2 * sent
    held = resident()
    for each in memory:
        each.release()
    assert taken(file) <= 32 * mmap.PAGESIZE
    assert held - resident() >= 0.9 * 4 * sent  # what both have joined
    for arrived in run([lambda me=me: rank(me) for me in range(2)]):
        assert torch.equal(arrived[:, :, 0], torch.tensor([[0.0, 1.0]]).expand(3, 2))


def resident() -> int:
    """Bytes of this process's own memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE


def taken(file: int) -> int:
    return os.fstat(file).st_blocks * 512


def test_messages_have_a_largest_size():
    assert CommonMemoryExchange.fits(1 << 30) and not CommonMemoryExchange.fits(4 << 30)
