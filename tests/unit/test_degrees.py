"""How many ranks along each axis."""

from __future__ import annotations

from itertools import product

import pytest

from parallel.degrees import Degrees, RequestedDegrees
from parallel.errors import ConfigError

AXES = ("dp", "cfg", "ring", "ulysses")


def every_request() -> list[dict[str, int]]:
    """0 to 4 for every axis."""
    return [dict(zip(AXES, values, strict=True)) for values in product(range(5), repeat=4)]


def can_be_filled(world_size: int, asked: dict[str, int]) -> bool:
    """By trying everything; cfg has no other automatic choice than 1 and 2, there being no third condition."""
    choices = [[asked[axis]] if asked[axis] else [1, 2] if axis == "cfg" else range(1, world_size + 1) for axis in AXES]
    return any(a * b * c * d == world_size for a, b, c, d in product(*choices))


@pytest.mark.parametrize("world_size", range(1, 9))
def test_what_is_asked_for_is_honoured_or_refused(world_size: int):
    for asked in every_request():
        try:
            requested = RequestedDegrees(world_size=world_size, **asked)
        except ConfigError:
            assert not can_be_filled(world_size, asked), asked
            continue
        for conditions, heads in product((1, 2), (1, 3, 24)):
            degrees, reason = requested.choose(conditions=conditions, heads=heads)
            assert degrees.world_size == world_size
            assert reason
            for axis, value in asked.items():
                assert not value or getattr(degrees, axis) == value, (asked, degrees)
            # Sharded weights stay where they are: the same ranks share a sequence at every step.
            sharded, reason = requested.choose(conditions=conditions, heads=heads, sharded=True)
            assert sharded.sp == requested.sharing, (asked, sharded)
            assert ("share the weights" in reason) == (degrees != sharded), (asked, reason)


@pytest.mark.parametrize(
    ("world_size", "asked", "conditions", "heads", "expected"),
    [
        (4, {}, 1, 24, Degrees(ulysses=4)),
        (4, {}, 2, 24, Degrees(ulysses=2, cfg=2)),
        (3, {}, 2, 24, Degrees(ulysses=3)),
        (4, {"cfg": 1}, 2, 24, Degrees(ulysses=4)),
        (4, {}, 1, 3, Degrees(ulysses=2, ring=2)),
        (2, {}, 1, 1, Degrees(ring=2)),
        (3, {}, 1, 4, Degrees(ulysses=3)),
        (8, {"ring": 2}, 1, 24, Degrees(ulysses=4, ring=2)),
        (8, {"ulysses": 2}, 1, 24, Degrees(ulysses=2, ring=4)),
        (4, {"ulysses": 1, "ring": 1}, 1, 24, Degrees(dp=4)),
        (1, {}, 2, 24, Degrees()),
    ],
)
def test_what_is_left_to_us(world_size: int, asked: dict[str, int], conditions: int, heads: int, expected: Degrees):
    requested = RequestedDegrees(world_size=world_size, **asked)
    assert requested.choose(conditions=conditions, heads=heads)[0] == expected


def test_the_reason_names_what_was_chosen():
    def reason(conditions: int, heads: int, **asked: int) -> str:
        return RequestedDegrees(world_size=2, **asked).choose(conditions=conditions, heads=heads)[1]

    assert "positive and negative prompt side by side" in reason(2, 24)
    assert "Ulysses" in reason(1, 24)
    assert "fewer heads than ranks" in reason(1, 1)
    assert reason(1, 24, ulysses=2, ring=1, cfg=1, dp=1) == "as asked"


@pytest.mark.parametrize(
    "asked", [{"ulysses": 3}, {"ulysses": 2, "ring": 3}, {"ulysses": 4, "cfg": 2}, {"dp": 8}, {"ring": 5}]
)
def test_a_product_that_cannot_be_prints_every_factor(asked: dict[str, int]):
    with pytest.raises(ConfigError) as caught:
        RequestedDegrees(world_size=4, **asked)
    for axis in AXES:
        assert f"{axis}_degree {asked.get(axis) or 'auto'}" in str(caught.value)
    assert "must be the number of devices, 4" in str(caught.value)


def test_groups_and_ranks_of_a_sequence():
    degrees = Degrees(dp=2, cfg=2, ring=3, ulysses=4)
    assert (degrees.sp, degrees.groups, degrees.world_size) == (12, 4, 48)
