"""The exchange through common memory, each rank a thread here."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.attention.exchange import CommonMemory, CommonMemoryExchange

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


# For each exchange, for each sender, elements for each receiver.
SIZES = st.integers(1, 4).flatmap(
    lambda world: st.lists(
        st.lists(st.lists(st.integers(0, 9), min_size=world, max_size=world), min_size=world, max_size=world),
        min_size=1,
        max_size=12,
    )
)


@settings(max_examples=60, deadline=None)
@given(exchanges=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), packed=st.booleans())
def test_every_piece_arrives_whole_and_in_order(exchanges, dtype, packed):
    world = len(exchanges[0])
    descriptor = os.memfd_create("test")
    memory = map_for(descriptor, world)

    def value(number: int, sender: int, receiver: int, count: int) -> torch.Tensor:
        return (torch.arange(count) + 100 * (number % 2) + 30 * sender + 7 * receiver).to(dtype)

    def rank(me: int) -> bool:
        exchange = CommonMemoryExchange(memory[me], 0, range(world))
        for number, table in enumerate(exchanges):
            sent, received = table[me], [row[me] for row in table]
            send = torch.cat([value(number, me, j, count) for j, count in enumerate(sent)])
            if packed:
                buffer = exchange.buffer(len(send), send)
                buffer.copy_(send)
                send = buffer
            arrival = exchange.start(send, sent, received)
            expected = [value(number, j, me, count) for j, count in enumerate(received)]
            if number % 2:
                assert torch.equal(arrival.joined(), torch.cat(expected))
            else:
                for piece, right in zip(arrival.pieces(), expected, strict=True):
                    assert torch.equal(piece, right)
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
            heard.append(arrival.joined().tolist())
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
        return exchange.start(torch.zeros(4), [2, 2], [2, expected]).joined()

    with pytest.raises(AssertionError, match="rank 1 sent 2 elements, the plan has 3"):
        run([lambda: rank(0, 3), lambda: rank(1, 2)])


def test_a_slow_peer_is_waited_for(file: int):
    memory = map_for(file, 2)
    late = threading.Event()

    def slow() -> object:
        late.wait()
        return CommonMemoryExchange(memory[1], 0, range(2)).start(torch.ones(2), [1, 1], [1, 1]).joined()

    def quick() -> object:
        arrival = CommonMemoryExchange(memory[0], 0, range(2)).start(torch.zeros(2), [1, 1], [1, 1])
        threading.Timer(0.05, late.set).start()
        return arrival.joined()

    first, second = run([quick, slow])
    assert torch.equal(first, torch.tensor([0.0, 1.0])) and torch.equal(second, first)


def test_released_memory_goes_back_to_the_system(file: int):
    (memory,) = map_for(file, 1)
    exchange = CommonMemoryExchange(memory, 0, [0])
    megabytes = torch.ones(4 << 20)
    exchange.start(megabytes, [len(megabytes)], [len(megabytes)]).joined()
    assert taken(file) >= megabytes.nbytes
    memory.release()
    assert taken(file) <= 16 * mmap.PAGESIZE
    assert torch.equal(exchange.start(megabytes, [len(megabytes)], [len(megabytes)]).joined(), megabytes)


def taken(file: int) -> int:
    return os.fstat(file).st_blocks * 512


def test_messages_have_a_largest_size():
    assert CommonMemoryExchange.fits(1 << 30) and not CommonMemoryExchange.fits(4 << 30)
