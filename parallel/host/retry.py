"""Runs what failed with its workers again on fresh ones, where SP Config says `on_failure: retry`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ..config import SequenceParallelConfig
from ..errors import WorkerError, WorkerOutOfMemoryError
from . import status

log = logging.getLogger("sequence_parallel")

T = TypeVar("T")
Restore = Callable[[], object]
"""Starts fresh workers and loads into them what they need."""


class Retry:
    """Decides whether a failure is worth a second attempt.

    Args:
        config: whose `on_failure` counts.

    Attributes:
        wanted: whether the user has chosen it.
    """

    def __init__(self, config: SequenceParallelConfig):
        self.wanted = config.on_failure == "retry"

    def may_help(self, error: WorkerError) -> bool:
        """Whether the same call may succeed on fresh workers. Memory would run out again, all the more beside a worker
        that could not be ended; and what workers refuse and survive they would refuse again."""
        hopeless = isinstance(error, WorkerOutOfMemoryError) or error.left_behind or not error.lost
        return self.wanted and not hopeless

    def run(self, attempt: Callable[[], T], restore: Restore | None, what: str) -> T:
        """The result of `attempt`, or of a second one.

        Args:
            restore: runs before the second attempt; None allows none.
            what: is repeated, for people.

        Raises:
            WorkerError: also the second attempt failed, or no second one was made.
        """
        try:
            return attempt()
        except WorkerError as error:
            if restore is None or not self.may_help(error):
                raise
            announce(error, what)
        restore()
        return attempt()


def announce(error: WorkerError, what: str) -> None:
    """Reports that a failure is followed by another attempt."""
    text = f"fresh workers repeat {what} (SP Config, on_failure: retry). The failure: {error}"
    log.warning("%s", text)
    status.tell(status.RETRIED, text)
