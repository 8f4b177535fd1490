"""Decides from the ranks' replies whether a group can be kept after a failed operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..wire.messages import Failure, Reply


def first_cause(errors: Sequence[Failure]) -> int:
    """Returns the index of the error to report. Peers of a failed rank report broken connections, so errors raised on
    purpose, then out-of-memory errors, then the earliest are preferred; `errors` are in order of arrival."""
    return min(range(len(errors)), key=lambda i: (not errors[i].expected, not errors[i].out_of_memory, i))


def refused_alike(replies: Sequence[Reply]) -> bool:
    """Returns True if all ranks raised the same engine error with no exchange pending, so that nothing is broken.

    Args:
        replies: failed reply of each rank.
    """
    errors = [reply.error for reply in replies if reply.error]
    same = len({(error.type, error.message) for error in errors}) == 1
    return same and all(error.expected and error.resumable for error in errors) and not pending(replies)


def short_of_memory(replies: Sequence[Reply]) -> bool:
    """Returns True if every rank ran out of memory by itself, with no exchange pending. The ranks can continue if their
    devices still compute, which must be tested.

    Args:
        replies: failed reply of each rank.
    """
    errors = [reply.error for reply in replies if reply.error]
    return all(error.out_of_memory and error.resumable for error in errors) and not pending(replies)


def pending(replies: Iterable[Reply]) -> list[str]:
    """Returns the names of the groups in which some ranks have launched more operations than others
    (`Ranks.launched`): the ranks ahead wait for the others, now or at the next step."""
    counts: dict[str, set[int]] = defaultdict(set)
    for reply in replies:
        for name, count in reply.launched.items():
            counts[name].add(count)
    return sorted(name for name, different in counts.items() if len(different) > 1)
