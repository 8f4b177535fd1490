"""What the workers are doing, as plain data for a panel, a report or a log.

Everything here is noted by the host as it goes: no worker is ever asked for it, and no lock is held while it computes.
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
"""Further ones, which are kept for the report."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a user wants to hear of when it happens."""

    kind: str
    text: str
    time: float
    """Seconds since the epoch."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Listener = Callable[[Event], None]
"""Called in the thread in which it happens, which may hold the group's locks: it must not wait, nor call the group."""

_listeners: list[Listener] = []
_errors: deque[Event] = deque(maxlen=_KEPT_ERRORS)


def listen(listener: Listener) -> None:
    """Tells this listener of every event from now on."""
    _listeners.append(listener)


def tell(kind: str, text: str) -> None:
    """Something has happened."""
    event = Event(kind, text, time.time())
    if kind in _TROUBLE:
        _errors.append(event)
    for listener in list(_listeners):
        try:
            listener(event)
        except Exception:  # who watches may not break what is watched
            log.exception("a listener of the workers' status failed")


def errors() -> list[Event]:
    """The last ones, oldest first."""
    return list(_errors)


# --- samplings --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sampling:
    """The steps of one sampling, counted as its sampler reports them.

    Use it in a `with` statement: what runs then is what a panel shows, and workers do not leave as idle.
    """

    model: str
    """`RemoteModel.name`."""
    steps: int
    step: int = 0
    """How many have been done."""
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
        """So many steps have been done; a sampler that chooses its steps itself may need more than were expected."""
        self.step, self.steps, self._last_done = step, max(step, self.steps), time.monotonic()
        self._first_done = self._first_done or self._last_done

    @property
    def seconds_per_step(self) -> float | None:
        """Of wall time, from the second step on: the first may wait for workers and weights. None before that."""
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
    """The one that runs, or the last one."""
    return _sampling


# --- figures of a group -----------------------------------------------------------------------------------------------

_OF_A_STEP = ("seconds", "collectives", "bytes_sent", "exposed_s", "copying_s")
"""The largest of any rank is shown."""
_single_steps: dict[Hashable, float] = {}
"""What was computed → seconds of its last step on one device."""


Phases = Mapping[str, float]
"""Name → seconds, in the order in which they ran; their sum is wall time."""


def phases_text(phases: Phases) -> str:
    """E.g. `torch 1.9 s, device 0.6 s`, for the log."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())


class GroupFigures:
    """What one group holds and has computed last.

    Attributes:
        start: phases of the start of the worker that the others waited for: python, torch, device, meeting.
        load: phases of the last load on the worker that took longest: libraries, weights; empty before a model was
            loaded.
        plan: the last step's degrees, and why these.
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
        """Each worker has got these weights.

        Args:
            name: of the model or VAE in the workers.
            title: for people; of a path, its last part.
            nbytes: on each worker.
        """
        self._held[name] = (Path(title).name, nbytes)

    def started(self, ranks: Sequence[Phases]) -> None:
        """All workers have met. The last one to get there spends the least time in the meeting."""
        self.start = min(ranks, key=lambda phases: phases["meeting"])

    def loaded(self, ranks: Sequence[Phases]) -> None:
        """Each worker has loaded a model."""
        self.load = max(ranks, key=lambda phases: sum(phases.values()))

    def dropped(self, name: str) -> None:
        self._held.pop(name, None)

    @property
    def weights(self) -> int:
        """Bytes on each worker."""
        return sum(nbytes for _, nbytes in list(self._held.values()))

    def stepped(
        self,
        work: Hashable,
        degrees: Degrees,
        reason: str,
        results: Sequence[Mapping[str, Any]],
        cache: Mapping[str, Any] | None,
    ) -> None:
        """A step has been computed.

        Args:
            work: equal for steps that compute the same, on however many devices.
            degrees: of the step.
            reason: why these.
            results: each rank's, see `RemoteModel.last_step`.
            cache: the report so far of the sampling's cache, if it has one (`CacheReport.to_json`). Such steps are not
                compared with others: which blocks they skip differs from step to step.
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
        """`seconds` of this rank's part of the last step, and `exposed_s` (`attention.traffic.Traffic`), or None."""
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
