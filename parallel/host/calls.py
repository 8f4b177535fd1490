"""Calls to a group's workers: sends operations to all ranks or to one, waits for the replies, and cancels.

Calls run in the caller's thread, which waits in short slices so that a call can be cancelled.
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
"""Callback, called every ≤ 100 ms in the caller's thread while a call runs; an exception from it cancels the call."""
Progress = Callable[[int, int], None]
"""Callback, called in the caller's thread with (done, total)."""

_NEXT = "The next prompt starts fresh workers"
_UNAWAITED = 0
"""`Reply.id` of replies that no caller waits for."""
_SLICE_S = 0.05
_DRAIN_TIMEOUT_S = 60.0
"""Silence after which ranks count as stuck in a call that has been cancelled."""
_GRACE_S = 1.0
"""Time for the peers of a failed rank to report before the group is ended."""
_GRACE_OUT_OF_MEMORY_S = 2.0
"""Grace period, instead of `_GRACE_S`, if a rank is out of memory: before PyTorch raises that error, it waits for the
device and frees its unused cached memory."""
_GRACE_REFUSAL_S = 5.0
"""Grace period, instead of `_GRACE_S`, if a rank refused the operation: its peers will refuse it too, even if a busy
machine delays them, and the group is kept."""
_PROBE_S = 5.0
"""Time for all ranks to free memory and test their devices after all of them ran out of memory."""


@dataclass(slots=True)
class Call:
    """An operation that every rank must answer, or a single rank (a *task*)."""

    number: int
    operation: str
    ranks: Sequence[int]
    work: Hashable | None = None
    """Kind of work, see `pace.work_of`."""
    advice: str = failures.ADVICE
    """Advice to the user if a rank is out of memory."""
    replies: dict[int, Reply] = field(default_factory=dict)
    """Maps ranks to their replies, in the order of arrival."""
    progress: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        return len(self.replies) == len(self.ranks)

    @property
    def failed(self) -> bool:
        """True if a rank has replied with an error."""
        return any(reply.error for reply in list(self.replies.values()))

    @property
    def slowest(self) -> tuple[int, int]:
        """Progress (done, total) of the slowest rank; (0, 0) until all ranks have reported."""
        return min(self.progress.values()) if len(self.progress) == len(self.ranks) else (0, 0)


class Calls:
    """Calls to the workers of one group; the base class of `WorkerGroup`.

    Args:
        layout: devices and degrees.
        supervisor: supervisor of the workers, which passes their messages to `_on_message`.
        fate: state of the group: usable, failed or stopped.
        control: control page through which a call is cancelled.

    Attributes:
        memory: segments that the host shares with the workers.
        messages: number of messages that calls have sent to each worker.
        last_used: time by `time.monotonic` at which the group was last acquired, or last answered.
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
        """Current call to all ranks; a cancelled one stays until it is settled."""
        self._tasks: dict[int, Call] = {}
        """Unanswered tasks, by number."""
        self._pace = Pace()

    @property
    def workers(self) -> list[WorkerProcess]:
        """Workers that have been started, by rank."""
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
        """Runs an operation on every rank and waits for all replies.

        If `poll` or `on_progress` raises, the workers are asked to stop and the exception propagates at once; the next
        call first waits until they have stopped.

        Args:
            message: operation to run.
            poll: called repeatedly in the caller's thread while the ranks work.
            on_progress: called with the progress of the slowest rank.
            advice: what the user can do, for the error raised if ranks are out of memory.

        Returns:
            Each rank's result.

        Raises:
            WorkerError: a rank failed. The group has been ended, except in two cases: all ranks raised the same error
                on purpose (`Failure.expected`), or all were out of memory and their devices still compute. Both require
                that no rank was in an exchange that others had not begun.
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
                if call.slowest[0]:  # a sampling has done a step, so each kind of its work has run
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
        """Sends an operation to every rank without waiting for replies.

        Takes no lock, so that a finalizer may call it at any point.
        """
        self._supervisor.post(message.to_json())

    def settle(self, poll: Poll | None = None) -> None:
        """Waits until the workers have ended a cancelled call; shared memory must not be touched before.

        Raises:
            WorkerError: the group has failed, now or earlier.
        """
        with held(self._lock, poll):
            call = self._call
            self.wait_for(lambda: not self._tasks and (call is None or call.answered or call.failed), poll)
            if call is not None and call.failed:
                try:
                    self._raise_failed(call)
                except WorkerError:  # an error that left the group usable concerns only the cancelled prompt
                    if self._fate.failing or self._fate.stopped:
                        raise
            elif call is None:
                self._fate.check()
            self._call = None

    @contextlib.contextmanager
    def tasks(self, poll: Poll | None = None) -> Iterator[None]:
        """Lets `submit` send operations to single ranks inside the `with` block; no other call runs meanwhile.

        Operations that need peers (collectives) are not allowed. If the block ends before all tasks are answered, the
        workers are asked to stop; the next call first waits until they have stopped.

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
        """Appends an operation to the queue of one rank. A call must have announced the segments that it uses.

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
        """Waits until `condition`, which depends on replies, is true.

        Raises:
            WorkerError: a worker has died or got stuck meanwhile.
        """
        watch = Watch(lambda: self._patience() if self._call is None else _DRAIN_TIMEOUT_S)
        while not self._when(condition):
            if poll is not None:
                poll()
            self._look(watch)

    def task_error(self, task: Call, advice: str) -> WorkerError:
        """Returns the exception for a failed task, and ends the group unless the rank refused the operation or was out
        of memory: the group stays usable then, since tasks have no exchanges.

        Args:
            advice: what the user can do if the rank was out of memory.
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
        except ValueError:  # the message cannot be encoded, so no rank has received it
            self._call = None
            raise
        self.memory.announced()
        return call

    def _open(self) -> list[Call]:
        """Returns the unanswered calls and tasks, a cancelled call included. May be called from any thread."""
        calls = [self._call, *list(self._tasks.values())]
        return [call for call in calls if call is not None and not call.answered]

    def _silent(self) -> set[int]:
        """Returns the ranks that have yet to answer a call or a task."""
        return {rank for call in self._open() for rank in call.ranks if rank not in call.replies}

    def _patience(self) -> float:
        return max((self._pace.patience(call.work) for call in self._open()), default=LONGEST_S)

    def _when(self, condition: Callable[[], bool]) -> bool:
        """Waits up to `_SLICE_S` for `condition`; returns False if it is not true by then.

        Raises:
            WorkerError: a worker has died meanwhile.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: condition() or self._fate.failure is not None, timeout=_SLICE_S)
        if not condition():
            self._fate.check()
        return done

    def _look(self, watch: Watch) -> None:
        """Ends the group, and raises its failure, if a worker counts as stuck."""
        waiting, silent = self._open(), self._silent()
        found = watch.look([self.workers[rank] for rank in sorted(silent)], self._control.beats(self.layout.world_size))
        if found is not None:
            self._fate.lose_and_raise(failures.stuck(found, self.layout, waiting[0].operation))

    def _raise_failed(self, call: Call) -> NoReturn:
        """Turns failed replies into an exception, and ends the group where it cannot be kept; see `call`."""
        with self._changed:
            self._changed.wait_for(lambda: call.answered or self._fate.failing, timeout=_grace(call))
        if any(worker.gone for worker in self.workers):  # the cause; its peers report broken connections
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
        """Returns True if all ranks free the failed operation's memory and their devices compute within `_PROBE_S`."""
        call = self._send(Recover())
        deadline = time.monotonic() + _PROBE_S
        with contextlib.suppress(EngineError):  # a worker died in the attempt, or the group was stopped
            while time.monotonic() < deadline:
                if self._when(lambda: call.answered or call.failed):
                    break
        return call.answered and not call.failed

    # --- callbacks of the supervisor --------------------------------------------------------------------------------

    def _on_message(self, worker: WorkerProcess, message: Message) -> None:
        call = self._call
        if message.get("event") == "progress":
            if call is not None:
                call.progress[worker.rank] = (message["done"], message["total"])
            return
        reply = from_plain(Reply, message)
        worker.memory = reply.memory or worker.memory  # None if the device has failed
        if (task := self._tasks.pop(reply.id, None)) is not None:
            task.replies[worker.rank] = reply
            if reply.result is not None:  # a task beats when it begins, so it is silent for its whole duration
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
        """Returns the name of an operation of this rank that not all its ranks have answered; None if there is none."""
        return next((call.operation for call in self._open() if rank in call.ranks), None)


def _grace(call: Call) -> float:
    """Returns the seconds in which the remaining ranks must report after a rank has failed."""
    errors = [reply.error for reply in list(call.replies.values()) if reply.error]
    if any(error.out_of_memory for error in errors):
        return _GRACE_OUT_OF_MEMORY_S
    return _GRACE_REFUSAL_S if all(error.expected and error.resumable for error in errors) else _GRACE_S


@contextlib.contextmanager
def held(lock: threading.Lock | threading.RLock, poll: Poll | None) -> Iterator[None]:
    """Holds `lock` inside the `with` block, and calls `poll` while it waits for it. The wait has no timeout: the thread
    that holds the lock runs a call or starts workers, which ends by itself or by its own time limit."""
    while not lock.acquire(timeout=_SLICE_S):
        if poll is not None:
            poll()
    try:
        yield
    finally:
        lock.release()
