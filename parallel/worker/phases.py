"""How long each part of a worker's start takes."""

from __future__ import annotations

import time


class Phases:
    """Seconds of phases that follow each other without a gap.

    Args:
        began: when the first one began, by `time.monotonic`: on Linux one clock for all processes.
    """

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self._last = began

    def end(self, name: str, at: float | None = None) -> None:
        """The phase that has been running is called `name`, and ends now, or has ended at `at`."""
        now = time.monotonic() if at is None else at
        self.seconds[name] = now - self._last
        self._last = now
