"""Repeats a call whose workers were lost on fresh workers, if SP Config has `on_failure: retry`."""

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
"""Starts fresh workers and loads the weights that they need."""


class Retry:
    """Decides whether a failure is worth a second attempt.

    Args:
        config: configuration with the user's `on_failure`.

    Attributes:
        wanted: True if the user chose `retry`.
    """

    def __init__(self, config: SequenceParallelConfig):
        self.wanted = config.on_failure == "retry"

    def may_help(self, error: WorkerError) -> bool:
        """Returns True if the same call may succeed on fresh workers. Memory would run out again, all the more beside a
        worker that could not be ended; and an operation that workers refused and survived would be refused again."""
        hopeless = isinstance(error, WorkerOutOfMemoryError) or error.left_behind or not error.lost
        return self.wanted and not hopeless

    def run(self, attempt: Callable[[], T], restore: Restore | None, what: str) -> T:
        """Returns the result of `attempt`, or of a second attempt if the first one fails.

        Args:
            restore: runs before the second attempt; None allows no second attempt.
            what: describes the repeated work, for the message to the user.

        Raises:
            WorkerError: the second attempt failed too, or none was made.
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
    """Reports that another attempt follows a failure."""
    text = f"fresh workers repeat {what}, because on_failure in SP Config is retry. The failure was: {error}"
    log.warning("%s", text)
    status.tell(status.RETRIED, text)
