"""The page by which a running step is stopped: all ranks stop before the same block, or none does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.wire.control import ControlPage

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

    def __init__(self, page: ControlPage, *, world: int, leader: int, blocks: int, run_ahead: int):
        self.page = page
        self.page.reset(world)
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
        elif self.page.should_stop(block, leader=rank == self.leader, run_ahead=self.run_ahead):
            self.outcome[rank] = block
        else:
            self.next_block[rank] = block + 1

    def run_to_the_end(self) -> None:
        while movable := [rank for rank in range(len(self.outcome)) if self.can_move(rank)]:
            for rank in movable:
                self.move(rank)


@given(
    data=st.data(),
    world=st.integers(1, 5),
    blocks=st.integers(1, 6),
    run_ahead=st.integers(0, 2),
    order=st.lists(st.integers(0, 4), max_size=40),
)
@settings(max_examples=400)
def test_all_ranks_stop_before_the_same_block(
    page: ControlPage, data: st.DataObject, world: int, blocks: int, run_ahead: int, order: list[int]
):
    leader = data.draw(st.integers(0, world - 1), label="leader")
    cancel_after = data.draw(st.integers(0, len(order)), label="moves before cancel")
    simulation = Simulation(page, world=world, leader=leader, blocks=blocks, run_ahead=run_ahead)
    for number, choice in enumerate(order):
        if number == cancel_after:
            simulation.page.request_cancel()
        if simulation.can_move(choice % world):
            simulation.move(choice % world)
    simulation.page.request_cancel()
    progress = simulation.next_block[leader]
    simulation.run_to_the_end()
    assert None not in simulation.outcome, "a rank waits for a block that the leader will never join"
    assert len(set(simulation.outcome)) == 1
    if isinstance(stopped := simulation.outcome[0], int):  # Cancel is prompt: at most one block and the run-ahead more
        assert stopped <= progress + 1 + run_ahead


@given(world=st.integers(1, 5), blocks=st.integers(1, 6), order=st.lists(st.integers(0, 4), max_size=40))
def test_nobody_stops_unasked(page: ControlPage, world: int, blocks: int, order: list[int]):
    simulation = Simulation(page, world=world, leader=0, blocks=blocks, run_ahead=0)
    for choice in order:
        if simulation.can_move(choice % world):
            simulation.move(choice % world)
    simulation.run_to_the_end()
    assert simulation.outcome == [FINISHED] * world


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_cancel_takes_effect_after_one_block_and_the_run_ahead(page: ControlPage, run_ahead: int):
    page.reset(1)
    assert not page.should_stop(3, leader=True, run_ahead=run_ahead)
    page.request_cancel()
    stops = [page.should_stop(block, leader=True, run_ahead=run_ahead) for block in range(4, 6 + run_ahead)]
    assert stops == [False] * (1 + run_ahead) + [True]


def test_only_the_leader_acts_on_the_hosts_wish(page: ControlPage):
    page.reset(2)
    page.request_cancel()
    assert not any(page.should_stop(block, leader=False, run_ahead=0) for block in range(10))


def test_reset_forgets_the_wish_and_the_beats(page: ControlPage):
    page.reset(2)
    page.beat(1)
    page.beat(1)
    page.beat(0)
    assert page.beats(2) == (1, 2)
    page.request_cancel()
    assert page.should_stop(0, leader=True, run_ahead=0) is False
    assert page.should_stop(1, leader=True, run_ahead=0) is True
    page.reset(2)
    assert not page.cancel_requested
    assert page.beats(2) == (0, 0)
    assert not any(page.should_stop(block, leader=True, run_ahead=0) for block in range(10))
