"""Calls of a group's workers: operations that every rank is to answer, or one; sent, awaited, cancelled.

They run in the caller's thread, which waits in short slices so that it can be cancelled.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..config import Layout
from ..errors import EngineError, WorkerError, WorkerOutOfMemoryError
from ..wire.channel import Message
from ..wire.control import ControlPage
from ..wire.messages import Operation, Recover, Reply
from ..wire.typed import from_plain
from . import failures, status, verdict
from .failures import Fate
from .memory import GroupMemory
from .pace import LONGEST_S, Pace, Watch, work_of
from .process import WorkerProcess
from .supervisor import Supervisor

log = logging.getLogger("sequence_parallel")

Poll = Callable[[], None]
"""Called every ≤ 100 ms in the caller's thread while a call runs; raising cancels the call."""
Progress = Callable[[int, int], None]
"""Called in the caller's thread with (done, total)."""

_NEXT = "The next prompt starts fresh workers"
_UNAWAITED = 0
"""Number of operations whose replies nobody waits for."""
_SLICE_S = 0.05
_DRAIN_TIMEOUT_S = 60.0
"""How long the ranks may be silent in a call that has been cancelled."""
_GRACE_S = 1.0
"""How long peers of a failed rank may take to report, before the group is ended."""
_GRACE_OUT_OF_MEMORY_S = 2.0
"""The same for one that is out of memory: before PyTorch says so, it waits for the device and gives back what it
does not use."""
_GRACE_REFUSAL_S = 5.0
"""The same for one that has refused: its peers will come to the same, and the group stays, however busy the machine."""
_PROBE_S = 5.0
"""How long ranks may take to free memory and try their devices, after all of them were out of memory."""


@dataclass(slots=True)
class Call:
    """An operation that every rank is to answer; or one rank, a *task*."""

    number: int
    operation: str
    ranks: Sequence[int]
    work: Hashable | None = None
    """See `pace.work_of`."""
    advice: str = failures.ADVICE
    """What a user can do where a rank is out of memory."""
    replies: dict[int, Reply] = field(default_factory=dict)
    """In the order of their arrival."""
    progress: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        return len(self.replies) == len(self.ranks)

    @property
    def failed(self) -> bool:
        """Whether a rank has."""
        return any(reply.error for reply in list(self.replies.values()))

    @property
    def slowest(self) -> tuple[int, int]:
        """Progress of the rank that has come least far."""
        return min(self.progress.values()) if len(self.progress) == len(self.ranks) else (0, 0)


class Calls:
    """What a group does for its callers.

    Args:
        layout: devices and degrees.
        supervisor: of the workers; tells `_on_message`.
        fate: of the group.
        control: by which a call is cancelled.

    Attributes:
        memory: what is shared with the workers.
        messages: how many each worker has been sent by calls.
        last_used: when the group was last asked for or has last answered, by `time.monotonic`.
    """

    def __init__(self, layout: Layout, supervisor: Supervisor, fate: Fate, control: ControlPage):
        self.layout = layout
        self.memory = GroupMemory()
        self.messages = 0
        self.last_used = time.monotonic()
        self._supervisor, self._fate, self._control = supervisor, fate, control
        self._lock = threading.RLock()
        self._changed = supervisor.changed
        self._numbers = itertools.count(1)
        self._call: Call | None = None
        """Of all ranks; a cancelled one stays until it is settled."""
        self._tasks: dict[int, Call] = {}
        """Those without an answer, by number."""
        self._pace = Pace()

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that have been started, by rank."""
        return self._supervisor.workers

    # --- for callers ------------------------------------------------------------------------------------------------

    def call(
        self,
        message: Operation,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
        advice: str = failures.ADVICE,
    ) -> list[dict[str, Any]]:
        """Runs an operation on every rank and waits for all answers.

        If `poll` or `on_progress` raises, the workers are asked to stop and the exception goes on at once; the next
        call first waits until they have.

        Args:
            message: what to do.
            poll: called again and again while the ranks work, in the caller's thread.
            on_progress: told how far the slowest rank is.
            advice: for the error of ranks that are out of memory: what a user can do.

        Returns:
            Each rank's result.

        Raises:
            WorkerError: a rank failed. The group has been ended, but in two cases: all ranks have raised the same error
                of the engine's own, or all were out of memory and their devices still compute; and no rank was in an
                exchange that others had not begun.
        """
        with held(self._lock, poll):
            self.settle(poll)
            call = self._send(message)
            call.advice = advice
            told = (0, 0)
            watch = Watch(self._patience)
            while not self._when(lambda: call.answered or call.failed):
                try:
                    if poll is not None:
                        poll()
                    if on_progress is not None and (slowest := call.slowest) != told:
                        told = slowest
                        on_progress(*told)
                except BaseException:
                    self._control.request_cancel()  # `settle` collects the answers
                    raise
                self._look(watch)
                if call.slowest[0]:  # a step of a sampling is done: each kind of its work has been seen
                    self._pace.measured(call.work, watch.longest)
            if call.failed:
                self._raise_failed(call)
            self._look(watch)
            self._pace.measured(call.work, watch.longest)
            if on_progress is not None and (slowest := call.slowest) != told:
                on_progress(*slowest)
            self._call = None
            self.last_used = time.monotonic()
            return [call.replies[rank].result for rank in call.ranks]

    def post(self, message: Operation) -> None:
        """Asks every rank for an operation without waiting for an answer.

        Takes no lock, so that a finalizer may call it in the middle of anything.
        """
        self._supervisor.post(message.to_json())

    def settle(self, poll: Poll | None = None) -> None:
        """Waits until a cancelled call has really ended; shared memory is not to be touched before.

        Raises:
            WorkerError: the group has failed, now or earlier.
        """
        with held(self._lock, poll):
            call = self._call
            self.wait_for(lambda: not self._tasks and (call is None or call.answered or call.failed), poll)
            if call is not None and call.failed:
                try:
                    self._raise_failed(call)
                except WorkerError:  # an error that left the group usable was the cancelled prompt's affair
                    if self._fate.failing or self._fate.stopped:
                        raise
            elif call is None:
                self._fate.check()
            self._call = None

    @contextlib.contextmanager
    def tasks(self, poll: Poll | None = None) -> Iterator[None]:
        """Inside, ranks can be given operations of their own with `submit`; no other call runs meanwhile.

        Operations that need peers (collectives) do not belong here. Whatever ends it early asks the workers to stop;
        the next call first waits until they have.

        Raises:
            WorkerError: the group has failed.
        """
        with held(self._lock, poll):
            self.settle(poll)
            self._control.reset(self.layout.world_size)
            try:
                yield
            finally:
                self.last_used = time.monotonic()
                if self._tasks and not self._fate.stopped:
                    self._control.request_cancel()

    def submit(self, rank: int, message: Operation) -> Call:
        """Gives one rank an operation, behind those it already has. Segments must have been announced by a call.

        Raises:
            WorkerError: the group has failed.
        """
        self._fate.check()
        task = Call(next(self._numbers), message.name, (rank,), work_of(message))
        self._tasks[task.number] = task
        try:
            self._supervisor.send(rank, message.to_json(task.number))
        except ValueError:
            del self._tasks[task.number]
            raise
        return task

    def wait_for(self, condition: Callable[[], bool], poll: Poll | None = None) -> None:
        """Waits for something that replies make true.

        Raises:
            WorkerError: a worker has died or is stuck meanwhile.
        """
        watch = Watch(lambda: self._patience() if self._call is None else _DRAIN_TIMEOUT_S)
        while not self._when(condition):
            if poll is not None:
                poll()
            self._look(watch)

    def task_error(self, task: Call, advice: str) -> WorkerError:
        """What a failed reply says. The group stays usable where the rank refused the operation, or was out of memory:
        tasks have no exchanges. Any other error ends it.

        Args:
            advice: what a user can do when it was the memory.
        """
        ((rank, reply),) = task.replies.items()
        assert reply.error is not None
        log.error("%s", failures.prefixed(rank, reply.error.traceback))
        kept = reply.error.expected or reply.error.out_of_memory
        failure = failures.raised(self.workers[rank], task.operation, reply.error, kept=kept, advice=advice)
        if not kept:
            self._fate.lose(failure)
        elif reply.error.out_of_memory:
            status.tell(status.OUT_OF_MEMORY, str(failure))
        return failure

    # --- parts ------------------------------------------------------------------------------------------------------

    def _send(self, message: Operation) -> Call:
        self._fate.check()
        self._control.reset(self.layout.world_size)
        ranks = range(self.layout.world_size)
        self._call = call = Call(next(self._numbers), message.name, ranks, work_of(message))
        self.messages += 1
        segments, fds = self.memory.announcement()
        frame = message.to_json(call.number, segments)
        try:
            for rank in call.ranks:
                self._supervisor.send(rank, frame, fds)
        except ValueError:  # it cannot be written, so no rank has got it
            self._call = None
            raise
        self.memory.announced()
        return call

    def _open(self) -> list[Call]:
        """What ranks have still to answer, a cancelled call included. May be called from any thread."""
        calls = [self._call, *list(self._tasks.values())]
        return [call for call in calls if call is not None and not call.answered]

    def _silent(self) -> set[int]:
        """The ranks that have to."""
        return {rank for call in self._open() for rank in call.ranks if rank not in call.replies}

    def _patience(self) -> float:
        return max((self._pace.patience(call.work) for call in self._open()), default=LONGEST_S)

    def _when(self, condition: Callable[[], bool]) -> bool:
        """Waits a slice of time for the condition.

        Raises:
            WorkerError: a worker has died meanwhile.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: condition() or self._fate.failure is not None, timeout=_SLICE_S)
        if not condition():
            self._fate.check()
        return done

    def _look(self, watch: Watch) -> None:
        """Ends the group if a worker counts as stuck."""
        waiting, silent = self._open(), self._silent()
        found = watch.look([self.workers[rank] for rank in sorted(silent)], self._control.beats(self.layout.world_size))
        if found is not None:
            self._fate.lose_and_raise(failures.stuck(found, self.layout, waiting[0].operation))

    def _raise_failed(self, call: Call) -> NoReturn:
        """Turns failed replies into an exception, and ends the group where it cannot be kept; see `call`."""
        with self._changed:
            self._changed.wait_for(lambda: call.answered or self._fate.failing, timeout=_grace(call))
        if any(worker.gone for worker in self.workers):  # the cause, which its peers' broken connections only follow
            self._fate.check_pending()
        failed = [(rank, reply, reply.error) for rank, reply in list(call.replies.items()) if reply.error]
        rank, _, cause = failed[verdict.first_cause([error for _, _, error in failed])]
        kept = False
        if len(failed) == len(call.ranks):
            replies = [reply for _, reply, _ in failed]
            kept = verdict.refused_alike(replies) or (verdict.short_of_memory(replies) and self._recovers())
        failure = failures.raised(self.workers[rank], call.operation, cause, kept=kept, advice=call.advice)
        for each, _, error in failed:
            level = logging.INFO if error.expected else logging.ERROR
            log.log(level, "%s", failures.prefixed(each, error.traceback))
        if not kept:
            self._fate.lose_and_raise(failure)
        self._call = None
        if isinstance(failure, WorkerOutOfMemoryError):
            status.tell(status.OUT_OF_MEMORY, str(failure))
        raise failure

    def _recovers(self) -> bool:
        """Whether all ranks free what the failed operation has left there, and their devices compute, in `_PROBE_S`."""
        call = self._send(Recover())
        deadline = time.monotonic() + _PROBE_S
        with contextlib.suppress(EngineError):  # one has died of it, or somebody has stopped them
            while time.monotonic() < deadline:
                if self._when(lambda: call.answered or call.failed):
                    break
        return call.answered and not call.failed

    # --- what the supervisor tells ----------------------------------------------------------------------------------

    def _on_message(self, worker: WorkerProcess, message: Message) -> None:
        call = self._call
        if message.get("event") == "progress":
            if call is not None:
                call.progress[worker.rank] = (message["done"], message["total"])
            return
        reply = from_plain(Reply, message)
        worker.memory = reply.memory or worker.memory  # a device that has failed does not say
        if (task := self._tasks.pop(reply.id, None)) is not None:
            task.replies[worker.rank] = reply
            if reply.result is not None:  # it gives a sign of life when it begins
                self._pace.measured(task.work, reply.result.get("seconds", 0.0))
            return
        if reply.id == _UNAWAITED:
            return
        if call is None or reply.id != call.number or worker.rank in call.replies:
            raise ValueError(f"a reply to call {reply.id}, which nobody waits for")
        call.replies[worker.rank] = reply

    def _on_end(self, worker: WorkerProcess) -> None:
        if not self._fate.stopped and not self._fate.failing:
            text = worker.describe_end(self._operation_of(worker.rank))
            self._fate.lose_unasked(worker.rank, f"{text}. {_NEXT}")

    def _on_loss(self, rank: int, text: str) -> None:
        operation = self._operation_of(rank)
        during = "" if operation is None else f" during {operation!r}"
        self._fate.lose_unasked(rank, f"{text}{during}. {_NEXT}")

    def _operation_of(self, rank: int) -> str | None:
        """What this rank has still to answer."""
        return next((call.operation for call in self._open() if rank in call.ranks), None)


def _grace(call: Call) -> float:
    """Seconds that the ranks which have not reported yet get, after one that has failed."""
    errors = [reply.error for reply in list(call.replies.values()) if reply.error]
    if any(error.out_of_memory for error in errors):
        return _GRACE_OUT_OF_MEMORY_S
    return _GRACE_REFUSAL_S if all(error.expected and error.resumable for error in errors) else _GRACE_S


@contextlib.contextmanager
def held(lock: threading.Lock | threading.RLock, poll: Poll | None) -> Iterator[None]:
    """Holds the lock. Another thread's call, or its start of workers, ends by itself or by its own time limit; `poll`
    is called until then."""
    while not lock.acquire(timeout=_SLICE_S):
        if poll is not None:
            poll()
    try:
        yield
    finally:
        lock.release()
