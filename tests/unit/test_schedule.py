"""Who computes which tile: a simulation with clocks instead of workers."""

from __future__ import annotations

import heapq

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.vae.schedule import Schedule


def simulate(
    costs: list[float], true_speeds: list[float], given_speeds: list[float], window: int, small: dict[int, float]
) -> tuple[float, dict[int, int], int]:
    """Hands out all tiles; `small` ranks fail with what costs more. The end, tile → rank, the most tiles held."""
    schedule = Schedule(costs, given_speeds, window)
    free = [0.0] * len(true_speeds)
    running: list[tuple[float, int, int, float]] = []
    done: dict[int, int] = {}
    now, blended, held = 0.0, 0, 0
    while blended < len(costs):
        while (choice := schedule.next(blended)) is not None:
            tile, rank = choice
            seconds = costs[tile] / true_speeds[rank]
            free[rank] = max(free[rank], now) + seconds
            heapq.heappush(running, (free[rank], tile, rank, seconds))
        assert running, "tiles are left, and no rank has any"
        held = max(held, len(running) + len(done) - blended)
        now, tile, rank, seconds = heapq.heappop(running)
        if costs[tile] > small.get(rank, float("inf")):
            assert schedule.out_of_memory(tile, rank)
        else:
            schedule.finished(tile, rank, seconds)
            assert tile not in done
            done[tile] = rank
        while blended in done:
            blended += 1
    return now, done, held


TILES = st.lists(st.floats(0.1, 1.0), min_size=1, max_size=40)
SPEEDS = st.lists(st.floats(0.2, 1.0), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(costs=TILES, speeds=SPEEDS, guessed=st.booleans())
def test_all_tiles_are_computed_once_within_the_window(costs, speeds, guessed):
    window = 3 * len(speeds)
    end, done, held = simulate(costs, speeds, [1.0] * len(speeds) if guessed else speeds, window, {})
    assert sorted(done) == list(range(len(costs)))
    assert held <= window
    alone = sum(costs) / max(speeds)
    assert end <= alone * 1.001 or len(speeds) > 1
    # No list schedule is worse than the sum at equal shares plus the longest tile on the slowest rank.
    assert end <= sum(costs) / sum(speeds) + 3 * max(costs) / min(speeds)


def test_equal_tiles_on_equal_ranks_split_evenly():
    end, done, _ = simulate([1.0] * 8, [1.0, 1.0], [1.0, 1.0], 6, {})
    assert end == 4.0
    assert sorted(done.values()) == [0] * 4 + [1] * 4


def test_unequal_ranks_share_by_speed_also_when_nobody_said_so():
    for told in ([2.0, 1.0], [1.0, 1.0]):
        end, done, _ = simulate([1.0] * 30, [2.0, 1.0], told, 6, {})
        assert 18 <= sum(rank == 0 for rank in done.values()) <= 21
        assert end <= 10.5


def test_a_slow_rank_leaves_the_last_tile_to_a_fast_one():
    _, done, _ = simulate([1.0] * 5, [10.0, 1.0], [10.0, 1.0], 6, {})
    assert set(done.values()) == {0}


def test_cheap_tiles_even_out():
    """Edge tiles of a row: by number alone, one rank would get all the cheap ones."""
    costs = [1.0, 0.2] * 8
    end, _, _ = simulate(costs, [1.0, 1.0], [1.0, 1.0], 6, {})
    assert end <= sum(costs) / 2 + 0.6


def test_a_rank_out_of_memory_hands_its_tile_on_and_keeps_to_smaller_ones():
    costs = [1.0, 0.2] * 6
    _, done, _ = simulate(costs, [1.0, 1.0], [1.0, 1.0], 6, {1: 0.5})
    assert all(rank == 0 for tile, rank in done.items() if costs[tile] == 1.0)
    assert any(rank == 1 for rank in done.values())


def test_no_rank_has_the_memory():
    schedule = Schedule([1.0], [1.0, 1.0], 6)
    tile, first = schedule.next(0)
    assert schedule.out_of_memory(tile, first)
    tile, second = schedule.next(0)
    assert {first, second} == {0, 1}
    assert not schedule.out_of_memory(tile, second)
