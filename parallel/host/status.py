"""State of the workers as plain data, for a panel, a report or a log.

The host records all of it as events occur: no worker is ever queried, and no lock is held while a worker computes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..degrees import Degrees

log = logging.getLogger("sequence_parallel")

_KEPT_ERRORS = 10
_KEPT_SINGLE_STEPS = 64

STARTED, LEFT, RETRIED, FALLBACK = "started", "left", "retried", "fallback"
"""Kinds of events."""
_TROUBLE = CRASHED, OUT_OF_MEMORY, NOT_FINITE = "crashed", "out_of_memory", "not_finite"
"""Kinds of failure events, which are kept for the report."""


@dataclass(frozen=True, slots=True)
class Event:
    """Event of which the user is notified when it occurs."""

    kind: str
    text: str
    time: float
    """Seconds since the epoch."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Listener = Callable[[Event], None]
"""Runs in the thread of the event, which may hold the group's locks: it must neither wait nor call the group."""

_listeners: list[Listener] = []
_errors: deque[Event] = deque(maxlen=_KEPT_ERRORS)


def listen(listener: Listener) -> None:
    """Registers a listener for all later events."""
    _listeners.append(listener)


def tell(kind: str, text: str) -> None:
    """Passes an event to all listeners, and keeps failures for the report."""
    event = Event(kind, text, time.time())
    if kind in _TROUBLE:
        _errors.append(event)
    for listener in list(_listeners):
        try:
            listener(event)
        except Exception:  # a listener must not break the work that it observes
            log.exception("a listener of the workers' status failed")


def errors() -> list[Event]:
    """Returns the last failure events (at most 10), oldest first."""
    return list(_errors)


# --- samplings --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sampling:
    """Step counter of one sampling, advanced as its sampler reports steps.

    Use it as a context manager: inside, a panel shows this sampling, and workers do not end as idle.
    """

    model: str
    """`RemoteModel.name`."""
    steps: int
    step: int = 0
    """Number of steps done."""
    running: bool = False
    _first_done: float = 0.0
    _last_done: float = 0.0

    def __enter__(self) -> Sampling:
        global _sampling
        _sampling = self
        self.running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False

    def advance(self, step: int) -> None:
        """Sets the number of steps done; raises the total if a sampler that chooses its own steps exceeds it."""
        self.step, self.steps, self._last_done = step, max(step, self.steps), time.monotonic()
        self._first_done = self._first_done or self._last_done

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall time per step without the first, which may wait for workers and weights; None before the second."""
        if self.step < 2:
            return None
        return (self._last_done - self._first_done) / (self.step - 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.steps,
            "running": self.running,
            "seconds_per_step": self.seconds_per_step,
        }


_sampling: Sampling | None = None


def sampling() -> Sampling | None:
    """Returns the running sampling, or the last one; None before the first."""
    return _sampling


# --- figures of a group -----------------------------------------------------------------------------------------------

_OF_A_STEP = ("seconds", "collectives", "bytes_sent", "exposed_s", "copying_s")
"""Figures of a step for which the largest value of all ranks is shown."""
_single_steps: dict[Hashable, float] = {}
"""Maps a kind of work to the seconds of its last step on one device."""


Phases = Mapping[str, float]
"""Maps names of phases to seconds, in the order in which they ran; the sum is wall time."""


def phases_text(phases: Phases) -> str:
    """Formats phases for the log, e.g. `torch 1.9 s, device 0.6 s`."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())


class GroupFigures:
    """Weights that one group holds, and figures of its last step.

    Attributes:
        start: start phases of the worker for which the others waited: python, torch, device, meeting.
        load: phases of the last load, on the slowest worker: libraries, weights; empty before a model was loaded.
        plan: degrees of the last step and the reason for them; None before the first.
    """

    def __init__(self) -> None:
        self.start: Phases = {}
        self.load: Phases = {}
        self._held: dict[str, tuple[str, int]] = {}
        self.plan: tuple[Degrees, str] | None = None
        self._results: list[Mapping[str, Any]] = []
        self._cache: Mapping[str, Any] | None = None
        self._speedup: float | None = None

    def holds(self, name: str, title: str, nbytes: int) -> None:
        """Records weights that each worker has loaded.

        Args:
            name: name of the model or VAE in the workers.
            title: display name; of a path, only the last part is shown.
            nbytes: bytes on each worker.
        """
        self._held[name] = (Path(title).name, nbytes)

    def started(self, ranks: Sequence[Phases]) -> None:
        """Records that all workers have joined. The last to arrive waits for the others least (phase `meeting`)."""
        self.start = min(ranks, key=lambda phases: phases["meeting"])

    def loaded(self, ranks: Sequence[Phases]) -> None:
        """Records that each worker has loaded a model."""
        self.load = max(ranks, key=lambda phases: sum(phases.values()))

    def dropped(self, name: str) -> None:
        self._held.pop(name, None)

    @property
    def weights(self) -> int:
        """Bytes of all recorded weights on each worker."""
        return sum(nbytes for _, nbytes in list(self._held.values()))

    def stepped(
        self,
        work: Hashable,
        degrees: Degrees,
        reason: str,
        results: Sequence[Mapping[str, Any]],
        cache: Mapping[str, Any] | None,
    ) -> None:
        """Records a step, and its speed-up over the same step on one device, if that has been measured.

        Args:
            work: key that is equal for steps with the same computation, on any number of devices.
            degrees: degrees of the step.
            reason: reason for these degrees.
            results: result of each rank, see `RemoteModel.last_step`.
            cache: current report of the sampling's cache, if it has one (`CacheReport.to_json`). Steps with a cache are
                not compared with others, because they skip different blocks each time.
        """
        self.plan, self._results, self._cache = (degrees, reason), list(results), cache
        self._speedup = None
        if cache is not None:
            return
        seconds = max(result["seconds"] for result in results)
        if len(results) == 1:
            _single_steps.pop(work, None)
            _single_steps[work] = seconds
            while len(_single_steps) > _KEPT_SINGLE_STEPS:
                del _single_steps[next(iter(_single_steps))]
        elif (alone := _single_steps.get(work)) is not None and seconds > 0:
            self._speedup = alone / seconds

    def of_rank(self, rank: int) -> dict[str, Any]:
        """Returns `seconds` and `exposed_s` (`attention.traffic.Traffic`) of the rank's last step; None if unknown."""
        result = self._results[rank] if rank < len(self._results) else {}
        return {name: result.get(name) for name in ("seconds", "exposed_s")}

    def to_json(self) -> dict[str, Any]:
        plan = None
        if self.plan is not None:
            degrees, reason = self.plan
            plan = {**asdict(degrees), "reason": reason}
        results = self._results
        step = None
        if results:
            step = {name: max(result[name] for result in results) for name in _OF_A_STEP}
        held = list(self._held.items())
        return {
            "start": self.start,
            "load": self.load,
            "models": [title for _, (title, _) in held],
            "plan": plan,
            "step": step,
            "cache": self._cache,
            "speedup": self._speedup,
            "sampling": _sampling.to_json() if _sampling and _sampling.model in dict(held) else None,
        }
