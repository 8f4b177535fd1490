"""Who owns which tokens and heads."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.plan import AttentionPlan, ranges, share_of, shares, spread

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9).map(float), st.floats(0.01, 100, allow_nan=False)), min_size=1, max_size=8
)


@st.composite
def plans(draw: st.DrawFn) -> AttentionPlan:
    weights = tuple(draw(WEIGHTS))
    total = draw(st.integers(len(weights), 500))
    ring_degree = draw(st.sampled_from([d for d in range(1, len(weights) + 1) if len(weights) % d == 0]))
    return AttentionPlan.of_sequence(total, draw(st.integers(1, 30)), weights, ring_degree)


# --- shares and ranges --------------------------------------------------------------------------------------------


@given(total=st.integers(0, 100_000), weights=WEIGHTS)
def test_shares_are_within_one_of_the_ideal(total: int, weights: list[float]):
    result = shares(total, weights)
    assert sum(result) == total
    scale = sum(Fraction(w) for w in weights)
    for share, weight in zip(result, weights, strict=True):
        assert share >= 0
        assert abs(share - Fraction(weight) * total / scale) < 1
    assert result == shares(total, list(weights))


@given(extra=st.integers(0, 200), minimum=st.integers(0, 3), weights=WEIGHTS)
def test_nobody_gets_less_than_the_minimum(extra: int, minimum: int, weights: list[float]):
    total = minimum * len(weights) + extra
    result = shares(total, weights, minimum)
    assert sum(result) == total
    assert min(result) >= minimum
    free = shares(total, weights)
    for share, unlimited in zip(result, free, strict=True):  # the minimum is paid for by those who have more
        assert share == minimum if unlimited <= minimum else minimum <= share <= unlimited


@given(total=st.integers(0, 10_000), ranks=st.integers(1, 16))
def test_equal_weights_give_equal_shares_the_first_ranks_take_the_rest(total: int, ranks: int):
    each, rest = divmod(total, ranks)
    assert shares(total, [1.0] * ranks) == (each + 1,) * rest + (each,) * (ranks - rest)


@pytest.mark.parametrize(
    ("total", "weights", "minimum", "expected"),
    [
        (12, [2, 1], 0, (8, 4)),
        (4, [1, 1, 1], 0, (2, 1, 1)),
        (10, [3, 1, 1], 0, (6, 2, 2)),
        (3, [100, 1, 1], 1, (1, 1, 1)),
        (5, [100, 1, 1], 1, (3, 1, 1)),
        (1, [1, 2], 0, (0, 1)),
        (0, [1, 1], 0, (0, 0)),
        (10, [0.1, 0.2], 0, (3, 7)),
    ],
)
def test_shares_by_example(total: int, weights: list[float], minimum: int, expected: tuple[int, ...]):
    assert shares(total, weights, minimum) == expected


def test_too_little_for_everybody_is_refused():
    with pytest.raises(ConfigError, match="3 cannot be split over 2 ranks with at least 2 each"):
        shares(3, [1, 1], minimum=2)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_ranges_are_contiguous(sizes: list[int]):
    result = ranges(sizes)
    assert [stop - start for start, stop in result] == sizes
    assert result[0][0] == 0
    assert all(left[1] == right[0] for left, right in pairwise(result))


# --- the plan -----------------------------------------------------------------------------------------------------


def rows(plan: AttentionPlan) -> list[range]:
    """The ranks of each Ulysses group, in the order of the ring."""
    width = plan.world_size // plan.ring_degree
    return [range(row * width, (row + 1) * width) for row in range(plan.ring_degree)]


@given(plans())
def test_every_token_has_one_owner(plan: AttentionPlan):
    total = sum(plan.tokens)
    assert [i for start, stop in plan.token_ranges for i in range(start, stop)] == list(range(total))
    assert min(plan.tokens) >= 1
    assert plan.tokens == plan.keys == shares(total, plan.weights, minimum=1)
    assert plan.chunks == tuple(sum(plan.tokens[rank] for rank in row) for row in rows(plan))


@given(plans())
def test_every_head_has_one_owner_in_each_row_the_same_in_all(plan: AttentionPlan):
    columns = [plan.head_ranges[rank] for rank in rows(plan)[0]]
    assert [i for start, stop in columns for i in range(start, stop)] == list(range(plan.heads))
    for row in rows(plan):
        assert [plan.head_ranges[rank] for rank in row] == columns
        assert all(plan.row(rank) == slice(row.start, row.stop) for rank in row)
    if plan.ring_degree == 1:
        assert plan.local_heads == shares(plan.heads, plan.weights)


@given(plans())
def test_all_ranks_compute_the_same_plan(plan: AttentionPlan):
    weights = tuple(float(str(w)) for w in plan.weights)
    again = AttentionPlan.of_sequence(sum(plan.tokens), plan.heads, weights, plan.ring_degree)
    assert again == plan
    assert (again.token_ranges, again.head_ranges) == (plan.token_ranges, plan.head_ranges)


def test_fewer_heads_than_ranks():
    assert AttentionPlan.of_sequence(10, 2, (1.0, 1.0, 1.0, 1.0)).local_heads == (1, 1, 0, 0)


def test_the_faster_rank_gets_the_only_head():
    assert AttentionPlan.of_sequence(8, 1, (1.0, 3.0)).local_heads == (0, 1)


def test_fewer_tokens_than_ranks_are_refused():
    with pytest.raises(ConfigError, match="tokens is 2; 3 ranks need one each: use fewer devices, or more tokens"):
        AttentionPlan.of_sequence(2, 24, (1.0, 1.0, 1.0))


@given(plans(), st.integers(1, 3), st.sampled_from([64, 128]), st.sampled_from([2, 4]))
def test_exchange_bytes_count_what_others_get(plan: AttentionPlan, batch: int, head_dim: int, itemsize: int):
    one_head_of_one_token = batch * head_dim * itemsize
    sent = [0] * plan.world_size
    for row in rows(plan):  # q, k, v to the owners of the heads, the result back
        for sender in row:
            for receiver in set(row) - {sender}:
                sent[sender] += 3 * plan.tokens[sender] * plan.local_heads[receiver] * one_head_of_one_token
                sent[sender] += plan.tokens[receiver] * plan.local_heads[sender] * one_head_of_one_token
    for place, row in enumerate(rows(plan)):  # each chunk's k and v travel on until they have seen every row
        for hop in range(plan.ring_degree - 1):
            held = plan.chunks[(place - hop) % plan.ring_degree]
            for sender in row:
                sent[sender] += 2 * held * plan.local_heads[sender] * one_head_of_one_token
    assert [plan.exchange_bytes(rank, batch, head_dim, itemsize) for rank in range(plan.world_size)] == sent


@given(st.integers(0, 40), st.integers(1, 9))
def test_samples_are_spread_as_equally_as_possible(samples: int, groups: int):
    parts = spread(samples, groups)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(samples))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
def test_each_sample_of_each_request_belongs_to_one_group(batches: list[int], groups: int):
    shared = [share_of(batches, group, groups) for group in range(groups)]
    for request, batch in enumerate(batches):
        assert [i for parts in shared for i in range(batch)[parts[request]]] == list(range(batch))


def test_cond_and_uncond_go_to_different_groups():
    assert share_of([1, 1], 0, 2) == [slice(0, 1), slice(0, 0)]
    assert share_of([1, 1], 1, 2)[1] == slice(0, 1)


def test_one_rank_sends_nothing():
    assert AttentionPlan.of_sequence(11, 4, (1.0,)).exchange_bytes(0, 1, 128, 4) == 0
