"""Whether a group can be kept after an operation that has failed, by what its ranks have replied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..wire.messages import Failure, Reply


def first_cause(errors: Sequence[Failure]) -> int:
    """Which of the errors, in the order of their arrival, to report: peers of a failed rank report broken connections;
    what was raised on purpose, or out of memory, is a cause."""
    return min(range(len(errors)), key=lambda i: (not errors[i].expected, not errors[i].out_of_memory, i))


def refused_alike(replies: Sequence[Reply]) -> bool:
    """Whether every rank has raised the same error of the engine's own, with no exchange under way: nothing is broken.

    Args:
        replies: of all ranks, each that of a failure.
    """
    errors = [reply.error for reply in replies if reply.error]
    same = len({(error.type, error.message) for error in errors}) == 1
    return same and all(error.expected and error.resumable for error in errors) and not pending(replies)


def short_of_memory(replies: Sequence[Reply]) -> bool:
    """Whether every rank has run out of memory by itself, with no exchange under way. If their devices still compute,
    which has to be tried, they can go on.

    Args:
        replies: of all ranks, each that of a failure.
    """
    errors = [reply.error for reply in replies if reply.error]
    return all(error.out_of_memory and error.resumable for error in errors) and not pending(replies)


def pending(replies: Iterable[Reply]) -> list[str]:
    """Names of the groups of ranks in which some have launched more operations than others (`Ranks.launched`): these
    wait for the others, now or at the next step."""
    counts: dict[str, set[int]] = defaultdict(set)
    for reply in replies:
        for name, count in reply.launched.items():
            counts[name].add(count)
    return sorted(name for name, different in counts.items() if len(different) > 1)
