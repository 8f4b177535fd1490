"""Which errors a group outlives."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.host import verdict
from parallel.wire.messages import Failure, Reply


def reply(message: str = "", launched: dict[str, int] | None = None, **kind: bool) -> Reply:
    known = {"expected": False, "out_of_memory": False, "resumable": True}
    error = Failure(type="RuntimeError", message=message, traceback="", **{**known, **kind})
    return Reply(id=1, launched=launched or {"group 0": 7}, memory=None, error=error)


def short(message: str = "", **others: Any) -> Reply:
    return reply(message, out_of_memory=True, **others)


def test_ranks_may_say_in_their_own_words_that_they_are_out_of_memory() -> None:
    assert verdict.short_of_memory([short("GPU 0 has"), short("GPU 1 has")])


@pytest.mark.parametrize(
    "other",
    [
        reply(expected=True),
        reply("illegal access"),
        short(resumable=False),
        short(launched={"group 0": 8}),
    ],
    ids=["refused", "broken", "in a collective", "behind"],
)
def test_out_of_memory_of_some_ranks_is_not_that_of_all(other: Reply) -> None:
    assert not verdict.short_of_memory([short(), other])


def test_the_same_refusal_by_all_ranks_breaks_nothing() -> None:
    assert verdict.refused_alike([reply("no", expected=True)] * 2)
    assert not verdict.refused_alike([reply("no", expected=True), reply("differs by 0.4", expected=True)])
    assert not verdict.refused_alike([reply("no", expected=True), reply("no", {"group 0": 8}, expected=True)])
    assert not verdict.refused_alike([reply("no", expected=True, resumable=False)] * 2)


def test_the_same_error_of_all_ranks_may_be_a_broken_device() -> None:
    assert not verdict.refused_alike([reply("illegal access")] * 2)
    assert not verdict.refused_alike([reply("illegal access")])


def test_groups_that_a_rank_does_not_belong_to_are_not_compared() -> None:
    replies = [short(launched={"world": 3, "left": 5}), short(launched={"world": 3, "right": 9})]
    assert verdict.pending(replies) == []
    replies.append(short(launched={"world": 3, "right": 8}))
    assert verdict.pending(replies) == ["right"]


def test_what_was_raised_first_and_on_purpose_is_the_cause() -> None:
    errors = [each.error for each in (reply("connection closed"), short("full"), reply("no", expected=True))]
    assert verdict.first_cause(errors) == 2
    assert verdict.first_cause(errors[:2]) == 1
    assert verdict.first_cause(errors[:1] * 2) == 0
