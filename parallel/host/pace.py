"""Detection of stuck ranks: compares a silence with the longest silence of the same work in this group so far.

A false alarm costs a prompt that would have finished, so all limits here err on the side of waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..wire.messages import Operation, RunNetwork, Sample, Step, Tile
from .process import WorkerProcess
from .process_state import HALTED, in_words, state

LONGEST_S = 600.0
"""Timeout for work of unknown speed, and the longest timeout of all. A rank that compiles gives signs of life."""
SHORTEST_S = 60.0
"""Shortest timeout: other programs may slow a machine down many times over."""
FACTOR = 10.0
"""Ratio of the timeout to the longest silence measured."""
FIRST_START_S = 300.0
"""Timeout for the first start of workers: reading PyTorch from a cold disk, once per worker, takes minutes."""
HALTED_S = 5.0
"""Seconds after which a stopped or ended process counts as stuck, whatever is left of the timeout."""
_LOOK_S = 1.0
"""Seconds between two checks of the process states, and the most that one check adds to a silence: while this process
was itself suspended, perhaps with its workers, no rank counts as silent."""
_KEPT = 64
"""Number of kinds of work whose longest silence is remembered."""


def work_of(message: Operation) -> Hashable | None:
    """Returns a key that is equal for operations with equally long silences: same model, degrees and sizes.

    Returns None for operations whose silences depend on more than sizes, such as reading files: they are not measured.
    """
    if isinstance(message, Step):
        shapes = tuple(request.x.shape for request in message.requests)
        return message.name, message.model, message.degrees, message.compile, shapes
    if isinstance(message, Sample):
        at_once = max((len(each.passes) for each in message.program if isinstance(each, RunNetwork)), default=0)
        return message.name, message.model, tuple(message.degrees), message.compile, message.size, at_once
    if isinstance(message, Tile):
        return message.name, message.vae, message.direction, tuple(message.shape)
    return None


class Pace:
    """Longest silence of each kind of work, in seconds.

    Args:
        unknown: timeout for work that has not been measured, in seconds.
    """

    def __init__(self, unknown: float = LONGEST_S) -> None:
        self._unknown = unknown
        self._longest: dict[Hashable, float] = {}

    def measured(self, work: Hashable | None, silence: float) -> None:
        if work is not None:
            self._longest[work] = max(silence, self._longest.pop(work, 0.0))
            while len(self._longest) > _KEPT:
                del self._longest[next(iter(self._longest))]

    def patience(self, work: Hashable | None) -> float:
        """Returns the seconds of silence after which a rank that does this work counts as stuck."""
        longest = self._longest.get(work)
        return self._unknown if longest is None else min(LONGEST_S, max(SHORTEST_S, FACTOR * longest))


@dataclass(frozen=True, slots=True)
class Stuck:
    """Workers that make no progress, and the evidence for it."""

    workers: Sequence[WorkerProcess]
    reason: str


class Watch:
    """Tracks the ranks' signs of life during one operation.

    Args:
        patience: returns the timeout in seconds; called at each `look`.
        clock: `time.monotonic`.
    """

    def __init__(self, patience: Callable[[], float], clock: Callable[[], float] = time.monotonic):
        self.longest = 0.0
        """Longest silence so far, in seconds, that ended with a sign of life."""
        self._patience = patience
        self._clock = clock
        self._looked = clock()
        self._silence = 0.0
        self._signs: object = None
        self._halted: dict[int, float] = {}
        """Maps a rank to the seconds for which every check has found its process halted."""
        self._since_states = 0.0

    def look(self, silent: Sequence[WorkerProcess], beats: tuple[int, ...]) -> Stuck | None:
        """Checks for stuck workers; must be called several times a second.

        Args:
            silent: workers that have not replied yet.
            beats: counters of signs of life of all ranks, see `ControlPage.beats`.

        Returns:
            The workers of `silent` that count as stuck; None if there are none.
        """
        passed = min(self._clock() - self._looked, _LOOK_S)
        self._looked = self._clock()
        self._silence += passed
        signs = (beats, len(silent))
        if signs != self._signs:
            if self._signs is not None:
                self.longest = max(self.longest, self._silence)
            self._signs, self._silence = signs, 0.0
        self._since_states += passed
        if self._since_states >= _LOOK_S and (stuck := self._halted_ones(silent)) is not None:
            return stuck
        if not silent or self._silence <= self._patience():
            return None
        # Peers of a rank that hangs wait for it; their counters stop at its own count or above.
        least = min(beats[worker.rank] for worker in silent)
        behind = [worker for worker in silent if beats[worker.rank] == least]
        states = " and ".join(in_words(state(worker.process.pid)) for worker in behind)
        return Stuck(behind, f"no sign of life for {self._silence:.0f} s ({states})")

    def _halted_ones(self, silent: Sequence[WorkerProcess]) -> Stuck | None:
        passed, self._since_states = self._since_states, 0.0
        found = {worker.rank: state(worker.process.pid) for worker in silent}
        self._halted = {
            rank: self._halted.get(rank, -passed) + passed for rank, letter in found.items() if letter in HALTED
        }
        workers = [worker for worker in silent if self._halted.get(worker.rank, 0.0) >= HALTED_S]
        if not workers:
            return None
        words = in_words(found[workers[0].rank])
        return Stuck(workers, f"for {self._halted[workers[0].rank]:.0f} s the process has been in {words}")
