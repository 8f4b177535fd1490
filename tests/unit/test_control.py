"""The page by which a running step is stopped: all ranks stop before the same block, or none does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.wire.control import MAX_RANKS, ControlPage
from parallel.worker.run_ahead import MOST

FINISHED = "finished"


@pytest.fixture(scope="module")
def page() -> Iterator[ControlPage]:
    page = ControlPage.create()
    yield page
    page.close()


class Simulation:
    """Ranks that run blocks at their own pace, held together by one rule: a block's collectives need the leader.

    A rank's host code may start a block when the block `1 + run_ahead` before it is complete, and no block is
    complete before the leader has joined it. Nothing else is assumed of the network or of the other ranks.
    """

    def __init__(
        self, page: ControlPage, *, group: int = 0, world: int, leader: int = 0, blocks: int, run_ahead: int = 0
    ):
        self.page, self.group = page, group
        self.leader, self.blocks, self.run_ahead = leader, blocks, run_ahead
        self.next_block = [0] * world
        self.outcome: list[int | str | None] = [None] * world

    def can_move(self, rank: int) -> bool:
        if self.outcome[rank] is not None:
            return False
        needs = self.next_block[rank] - 1 - self.run_ahead
        return rank == self.leader or self.next_block[self.leader] > needs

    def move(self, rank: int) -> None:
        """Starts the rank's next block, unless it is to stop there."""
        block = self.next_block[rank]
        if block == self.blocks:
            self.outcome[rank] = FINISHED
        elif self.should_stop(rank, block):
            self.outcome[rank] = block
        else:
            self.next_block[rank] = block + 1

    def should_stop(self, rank: int, block: int) -> bool:
        leads = rank == self.leader
        return self.page.should_stop(block, group=self.group, leader=leads, run_ahead=self.run_ahead)

    def run_to_the_end(self) -> None:
        while movable := [rank for rank in range(len(self.outcome)) if self.can_move(rank)]:
            for rank in movable:
                self.move(rank)


@given(
    data=st.data(),
    world=st.integers(1, 5),
    blocks=st.integers(1, 6),
    run_ahead=st.integers(0, MOST),
    order=st.lists(st.integers(0, 4), max_size=40),
)
@settings(max_examples=400)
def test_all_ranks_stop_before_the_same_block(
    page: ControlPage, data: st.DataObject, world: int, blocks: int, run_ahead: int, order: list[int]
):
    page.reset(world)
    leader = data.draw(st.integers(0, world - 1), label="leader")
    cancel_after = data.draw(st.integers(0, len(order)), label="moves before cancel")
    ranks = Simulation(page, world=world, leader=leader, blocks=blocks, run_ahead=run_ahead)
    for number, choice in enumerate(order):
        if number == cancel_after:
            page.request_cancel()
        if ranks.can_move(choice % world):
            ranks.move(choice % world)
    page.request_cancel()
    progress = ranks.next_block[leader]
    ranks.run_to_the_end()
    assert None not in ranks.outcome, "a rank waits for a block that the leader will never join"
    assert len(set(ranks.outcome)) == 1
    if isinstance(stopped := ranks.outcome[0], int):  # Cancel is prompt: at most one block and the run-ahead more
        assert stopped <= progress + 1 + run_ahead


@pytest.mark.parametrize("run_ahead", range(4))
@pytest.mark.parametrize("leader", [0, 1])
def test_every_interleaving_of_two_ranks_stops_alike(page: ControlPage, leader: int, run_ahead: int):
    """Exhaustive: every order of the two ranks' moves, with Cancel before each of them."""
    blocks = 4
    for choices in product(range(2), repeat=2 * blocks + 1):
        if sum(choices) not in (blocks, blocks + 1):
            continue  # a rank makes at most `blocks` moves and one that ends it
        for cancel_before in range(len(choices)):
            page.reset(2)
            ranks = Simulation(page, world=2, leader=leader, blocks=blocks, run_ahead=run_ahead)
            for number, choice in enumerate(choices):
                if number == cancel_before:
                    page.request_cancel()
                if ranks.can_move(choice):
                    ranks.move(choice)
            ranks.run_to_the_end()
            assert None not in ranks.outcome
            assert len(set(ranks.outcome)) == 1


def test_ranks_that_run_ahead_unequally_do_not_stop_alike(page: ControlPage):
    """Why the number is agreed: a rank that is further ahead than the leader says passes the block it names."""
    page.reset(2)
    ranks = Simulation(page, world=2, blocks=9, run_ahead=2)
    for _ in range(3):
        ranks.move(1)  # it may: nothing is known of block 0 yet
    page.request_cancel()
    assert page.should_stop(0, group=0, leader=True, run_ahead=0) is False
    assert page.should_stop(1, group=0, leader=True, run_ahead=0) is True
    assert ranks.next_block[1] > 1


@given(blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)), order=st.lists(st.integers(0, 5), max_size=40))
def test_groups_stop_each_by_themselves(page: ControlPage, blocks: tuple[int, int], order: list[int]):
    """Groups that work on different samples meet in no collective, so they may stop at different blocks."""
    page.reset(6)
    groups = [Simulation(page, group=group, world=3, blocks=blocks[group]) for group in range(2)]
    for number, choice in enumerate(order):
        if number == len(order) // 2:
            page.request_cancel()
        if groups[choice % 2].can_move(choice // 2):
            groups[choice % 2].move(choice // 2)
    page.request_cancel()
    for group in groups:
        group.run_to_the_end()
        assert None not in group.outcome
        assert len(set(group.outcome)) == 1


@given(world=st.integers(1, 5), blocks=st.integers(1, 6), order=st.lists(st.integers(0, 4), max_size=40))
def test_nobody_stops_unasked(page: ControlPage, world: int, blocks: int, order: list[int]):
    page.reset(world)
    ranks = Simulation(page, world=world, blocks=blocks)
    for choice in order:
        if ranks.can_move(choice % world):
            ranks.move(choice % world)
    ranks.run_to_the_end()
    assert ranks.outcome == [FINISHED] * world


def stops(page: ControlPage, blocks: range, *, leader: bool = True, run_ahead: int = 0) -> list[bool]:
    return [page.should_stop(block, group=0, leader=leader, run_ahead=run_ahead) for block in blocks]


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_cancel_takes_effect_after_one_block_and_the_run_ahead(page: ControlPage, run_ahead: int):
    page.reset(1)
    assert stops(page, range(4), run_ahead=run_ahead) == [False] * 4
    page.request_cancel()
    assert stops(page, range(4, 6 + run_ahead), run_ahead=run_ahead) == [False] * (1 + run_ahead) + [True]


def test_only_the_leader_acts_on_the_hosts_wish(page: ControlPage):
    page.reset(2)
    page.request_cancel()
    assert not any(stops(page, range(10), leader=False))


def test_reset_forgets_the_wish_and_the_beats(page: ControlPage):
    page.reset(2)
    page.beat(1)
    page.beat(1)
    page.beat(0)
    assert page.beats(2) == (1, 2)
    page.request_cancel()
    assert stops(page, range(2)) == [False, True]
    page.reset(2)
    assert not page.cancel_requested
    assert page.beats(2) == (0, 0)
    assert not any(stops(page, range(10)))


def test_words_of_ranks_and_groups_do_not_meet(page: ControlPage):
    """As many groups as ranks, at the page's limit."""
    page.reset(MAX_RANKS)
    for rank in range(MAX_RANKS):
        page.beat(rank)
    assert not page.cancel_requested
    assert page.beats(MAX_RANKS) == (1,) * MAX_RANKS
    page.request_cancel()
    last = MAX_RANKS - 1
    assert [page.should_stop(block, group=last, leader=True, run_ahead=0) for block in range(2)] == [False, True]
    assert page.beats(MAX_RANKS) == (1,) * MAX_RANKS
