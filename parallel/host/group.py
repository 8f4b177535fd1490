"""A group of worker processes, one per device: started once, called many times, ended together.

Threads: each group has a supervisor, which starts the processes and reads what they say. Calls run in the caller's
thread, which waits in short slices so that it can be cancelled.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ..config import Layout
from ..errors import EngineError, WorkerDiedError, WorkerError, WorkerOutOfMemoryError
from ..wire.channel import Message
from ..wire.control import ControlPage
from ..wire.messages import Operation, Recover
from . import status, verdict
from .memory import GroupMemory
from .pace import LONGEST_S, Pace, Stuck, Watch, work_of
from .process import SEND_TIMEOUT_S, WorkerProcess
from .process_state import in_words, state
from .supervisor import LEAVE_S, REAP_S, Supervisor

log = logging.getLogger("sequence_parallel")

Poll = Callable[[], None]
"""Called every ≤ 100 ms in the caller's thread while a call runs; raising cancels the call."""
Progress = Callable[[int, int], None]
"""Called in the caller's thread with (done, total)."""

_SLICE_S = 0.05
_START_TIMEOUT_S = 180.0
_DRAIN_TIMEOUT_S = 60.0
"""How long the ranks may be silent in a call that has been cancelled."""
_GRACE_S = 1.0
"""How long peers of a failed rank may take to report, before the group is ended."""
_GRACE_OUT_OF_MEMORY_S = 2.0
"""The same for one that is out of memory: before PyTorch says so, it waits for the device and gives back what it
does not use."""
_PROBE_S = 5.0
"""How long ranks may take to free memory and try their devices, after all of them were out of memory."""


@dataclass(slots=True)
class _Call:
    """An operation that every rank is to answer."""

    number: int
    operation: str
    replies: dict[int, Message] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    progress: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class Task:
    """An operation that one rank is to answer."""

    rank: int
    operation: str
    work: Hashable | None = None
    """See `pace.work_of`."""
    reply: Message | None = None


class WorkerGroup:
    """The worker processes of one layout.

    Args:
        layout: devices and degrees.
        threads: CPU threads of each worker; by default an equal share of this process's, or of its cores.
        first: recipe of the model that will be loaded first, if known: workers import its library while they meet.

    Attributes:
        generation: changes with every group, so that a model knows whether its weights went with an older one.
        figures: what it holds and has computed, for those who watch.
        last_used: when it was last asked for or has last answered, by `time.monotonic`.
        messages: how many each worker has been sent by calls.
    """

    _generations = itertools.count(1)

    def __init__(self, layout: Layout, threads: int | None = None, first: Mapping[str, Any] | None = None):
        self.layout = layout
        self.first = first
        self.generation = next(self._generations)
        self.messages = 0
        self._control = ControlPage.create()
        self.memory = GroupMemory()
        self.figures = status.GroupFigures()
        self.last_used = time.monotonic()
        self._call_lock = threading.RLock()
        self._changed = threading.Condition()
        self._call: _Call | None = None
        self._tasks: dict[int, Task] = {}
        """Those without an answer, by number."""
        self._numbers = itertools.count(1)
        self._pace = Pace()
        self._failure: WorkerError | None = None
        self._failing = False
        """The failure is about to be known."""
        self._closing = False
        self._stopped = "the workers were stopped"
        self._supervisor = Supervisor(
            layout,
            threads or _threads_per_worker(layout),
            self._control.fileno(),
            first,
            self._changed,
            on_message=self._on_message,
            on_end=self._on_end,
            on_blocked=self._on_blocked,
            on_failure=self._on_supervisor_failure,
        )

    @property
    def _workers(self) -> list[WorkerProcess]:
        return self._supervisor.workers

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Starts the processes and waits until they have met.

        Raises:
            WorkerDiedError: a worker could not start; the message ends with its last lines of output.
        """
        began = time.monotonic()
        self._supervisor.start()
        atexit.register(self.stop)
        try:
            while not self._when(lambda: sum(w.ready for w in self._workers) == self.layout.world_size):
                if poll is not None:
                    poll()
                if time.monotonic() - began > _START_TIMEOUT_S:
                    late = [w for w in self._workers if not w.ready]
                    names = ", ".join(w.describe() for w in late) or "the workers"
                    said = "".join(w.output_so_far() for w in late[:1])
                    text = f"{names} did not start within {_START_TIMEOUT_S:g} s{self._advice}{said}"
                    self._fail_with(WorkerDiedError(text, rank=late[0].rank if late else 0))
        except BaseException:
            self.stop()
            raise
        self.figures.started([worker.start_seconds for worker in self._workers])
        seconds, phases = time.monotonic() - began, status.phases_text(self.figures.start)
        log.info("workers started in %.1f s (%s) on %s", seconds, phases, self.layout.describe())
        self.last_used = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether all workers have met and none has failed."""
        everyone = self._supervisor.running == self.layout.world_size
        return self._failure is None and not self._closing and everyone

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    @property
    def titles(self) -> list[str]:
        """The model of each worker's device."""
        return [worker.title for worker in self._workers]

    def cached_on(self, device: str) -> int:
        """Bytes of a GPU that its worker has taken and does not use, as it last said."""
        return sum(worker.cached for worker in self._workers if worker.device.name == device)

    @property
    def busy(self) -> bool:
        """Whether an operation runs, a cancelled one included."""
        return self._operation() is not None

    def status(self) -> dict[str, Any]:
        """What each worker is doing, and what the group has computed last (`GroupFigures.to_json`), as plain data.

        Reads only what the host knows; may be called from any thread at any time.
        """
        state = "idle"
        if self._failure is not None:
            state = "dead"
        elif self._closing:
            state = "stopped"
        elif not self.alive:
            state = "starting"
        elif (operation := self._operation()) is not None:
            state = operation
        return {
            "id": self.generation,
            "devices": self.layout.describe(),
            "chosen": self.layout.reason,
            "state": state,
            "failure": None if self._failure is None else str(self._failure),
            "ranks": [self._rank_status(worker, state) for worker in list(self._workers)],
            **self.figures.to_json(),
        }

    def _operation(self) -> str | None:
        call, tasks = self._call, list(self._tasks.values())
        if call is not None and len(call.replies) < self.layout.world_size:  # a cancelled one stays until it is settled
            return call.operation
        return tasks[0].operation if tasks else None

    def _rank_status(self, worker: WorkerProcess, state: str) -> dict[str, Any]:
        call, rank = self._call, worker.rank
        if state == "dead":
            state = "dead" if self._failure is not None and self._failure.rank == rank else "stopped"
        elif state == "starting":
            state = "ready" if worker.ready else "starting"
        elif self.busy and not self._is_busy(rank):
            state = "waiting"
        return {
            "rank": rank,
            "pid": worker.process.pid,
            "state": state,
            "progress": call.progress.get(rank) if call is not None else None,
            "weights": min(self.figures.weights, worker.memory),
            **worker.device_status(),
            **self.figures.of_rank(rank),
        }

    def _is_busy(self, rank: int) -> bool:
        call = self._call
        if call is not None and len(call.replies) < self.layout.world_size:
            return rank not in call.replies
        return any(task.rank == rank for task in list(self._tasks.values()))

    def stop(self, reason: str = "the workers were stopped") -> None:
        """Ends the processes. Safe to call again, and from any thread.

        Args:
            reason: what a call that runs meanwhile fails with.
        """
        with self._changed:
            if self._closing:
                return
            self._stopped = reason
            self._closing = True
        atexit.unregister(self.stop)
        busy = self._failure is not None or self._call is not None or self._tasks
        left_behind = self._supervisor.end(0.0 if busy else LEAVE_S)
        if left_behind and not self._failing:  # else the failure's message names them
            text = ". ".join(worker.describe_left_behind() for worker in left_behind)
            log.error("%s", text)
            status.tell(status.CRASHED, text)
        # A thread in the middle of a call leaves it first: it would touch what is closed here.
        alone = self._call_lock.acquire(timeout=LEAVE_S)
        try:
            self._supervisor.close()
            self.memory.close()
            self._control.close()
        finally:
            if alone:
                self._call_lock.release()

    # --- calls --------------------------------------------------------------------------------------------------

    def call(
        self, message: Operation, *, poll: Poll | None = None, on_progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Runs an operation on every rank and waits for all answers.

        If `poll` or `on_progress` raises, the workers are asked to stop and the exception goes on at once; the next
        call first waits until they have.

        Returns:
            Each rank's result.

        Raises:
            WorkerError: a rank failed. The group has been ended, but in two cases: all ranks have raised the same error
                of the engine's own, or all were out of memory and their devices still compute; and no rank was in an
                exchange that others had not begun.
        """
        with self._turn(poll):
            self.settle(poll)
            call = self._send(message)
            told = (0, 0)
            work = work_of(message)
            watch = Watch(lambda: self._pace.patience(work))
            while not self._when(lambda: len(call.replies) == len(self._workers) or self._failed_reply(call)):
                try:
                    if poll is not None:
                        poll()
                    if on_progress is not None and (slowest := self._slowest(call)) != told:
                        told = slowest
                        on_progress(*told)
                except BaseException:
                    self._control.request_cancel()  # `settle` collects the answers
                    raise
                self._look(watch, message.name, self._silent(call))
                if self._slowest(call)[0]:  # a step of a sampling is done: each kind of its work has been seen
                    self._pace.measured(work, watch.longest)
            if self._failed_reply(call):
                self._raise_failed(call)
            self._look(watch, message.name, [])
            self._pace.measured(work, watch.longest)
            if on_progress is not None and (slowest := self._slowest(call)) != told:
                on_progress(*slowest)
            self._call = None
            self.last_used = time.monotonic()
            return [call.replies[rank]["result"] for rank in range(len(self._workers))]

    @contextlib.contextmanager
    def tasks(self, poll: Poll | None = None) -> Iterator[None]:
        """Inside, ranks can be given operations of their own with `submit`; no other call runs meanwhile.

        Operations that need peers (collectives) do not belong here. Whatever ends it early asks the workers to stop;
        the next call first waits until they have.

        Raises:
            WorkerError: the group has failed.
        """
        with self._turn(poll):
            self.settle(poll)
            self._control.reset(len(self._workers))
            try:
                yield
            finally:
                self.last_used = time.monotonic()
                if self._tasks and not self._closing:
                    self._control.request_cancel()

    def submit(self, rank: int, message: Operation) -> Task:
        """Gives one rank an operation, behind those it already has. Segments must have been announced by a call.

        Raises:
            WorkerError: the group has failed.
        """
        self._raise_failure()
        number, task = next(self._numbers), Task(rank, message.name, work_of(message))
        self._tasks[number] = task
        self._supervisor.send(rank, {"id": number, "segments": [], **message.to_json()})
        return task

    def wait_for_tasks(self, condition: Callable[[], bool], poll: Poll | None = None) -> None:
        """Waits for something that the tasks' replies make true.

        Raises:
            WorkerError: a worker has died or is stuck meanwhile.
        """
        watch = Watch(self._patience_with_tasks)
        while not self._when(condition):
            if poll is not None:
                poll()
            self._look_at_tasks(watch)

    def task_error(self, task: Task, advice: str) -> WorkerError:
        """What a failed reply says. The group stays usable where the rank refused the operation, or was out of memory:
        tasks have no exchanges. Any other error ends it.

        Args:
            advice: what a user can do when it was the memory.
        """
        assert task.reply is not None and not task.reply["ok"]
        error = task.reply["error"]
        log.error("%s", _prefixed(task.rank, error["traceback"]))
        kept = error["expected"] or error["out_of_memory"]
        failure = self._remote_error(self._workers[task.rank], task.operation, error, kept=kept, advice=advice)
        if not kept:
            self._lose(failure)
        elif error["out_of_memory"]:
            status.tell(status.OUT_OF_MEMORY, str(failure))
        return failure

    def post(self, message: Operation) -> None:
        """Asks every rank for an operation without waiting for an answer.

        Takes no lock, so that a finalizer may call it in the middle of anything.
        """
        self._supervisor.post({"id": 0, "segments": [], **message.to_json()})

    def _slowest(self, call: _Call) -> tuple[int, int]:
        return min(call.progress.values()) if len(call.progress) == len(self._workers) else (0, 0)

    def _send(self, message: Operation) -> _Call:
        self._raise_failure()
        self._control.reset(len(self._workers))
        self._call = call = _Call(next(self._numbers), message.name)
        self.messages += 1
        segments, fds = self.memory.announce()
        frame = {"id": call.number, "segments": segments, **message.to_json()}
        for rank in range(len(self._workers)):
            self._supervisor.send(rank, frame, fds)
        return call

    def settle(self, poll: Poll | None = None) -> None:
        """Waits until a cancelled call has really ended; shared memory is not to be touched before.

        Raises:
            WorkerError: the group has failed, now or earlier.
        """
        with self._turn(poll):
            self._settle_tasks(poll)
            call = self._call
            if call is None:
                self._raise_failure()
                return
            watch = Watch(lambda: _DRAIN_TIMEOUT_S)
            while not self._when(lambda: len(call.replies) == len(self._workers) or self._failed_reply(call)):
                if poll is not None:
                    poll()
                self._look(watch, call.operation, self._silent(call))
            if self._failed_reply(call):
                try:
                    self._raise_failed(call)
                except WorkerError:  # an error that left the group usable was the cancelled prompt's affair
                    if not self.alive:
                        raise
            self._call = None

    def _settle_tasks(self, poll: Poll | None) -> None:
        watch = Watch(self._patience_with_tasks)  # a task is not cut short
        while self._tasks and not self._when(lambda: not self._tasks):
            if poll is not None:
                poll()
            self._look_at_tasks(watch)

    @contextlib.contextmanager
    def _turn(self, poll: Poll | None) -> Iterator[None]:
        """Inside, no other thread calls. Another one's call ends by itself, or by its own time limit; `poll` is called
        until then."""
        while not self._call_lock.acquire(timeout=_SLICE_S):
            if poll is not None:
                poll()
        try:
            yield
        finally:
            self._call_lock.release()

    def _when(self, condition: Callable[[], bool]) -> bool:
        """Waits a slice of time for the condition.

        Raises:
            WorkerError: a worker has died meanwhile.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: condition() or self._failure is not None, timeout=_SLICE_S)
        if not condition():
            self._raise_failure()
        return done

    @staticmethod
    def _failed_reply(call: _Call) -> bool:
        return any(not reply["ok"] for reply in call.replies.values())

    def _silent(self, call: _Call) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.rank not in call.replies]

    def _patience_with_tasks(self) -> float:
        return max((self._pace.patience(task.work) for task in list(self._tasks.values())), default=LONGEST_S)

    def _look_at_tasks(self, watch: Watch) -> None:
        pending = list(self._tasks.values())
        if pending:
            ranks = {task.rank for task in pending}
            self._look(watch, pending[0].operation, [self._workers[rank] for rank in sorted(ranks)])

    def _look(self, watch: Watch, operation: str, silent: list[WorkerProcess]) -> None:
        """Ends the group if a worker counts as stuck."""
        if (stuck := watch.look(silent, self._control.beats(len(self._workers)))) is not None:
            self._fail_stuck(operation, stuck)

    def _raise_failed(self, call: _Call) -> NoReturn:
        """Turns failed replies into an exception, and ends the group where it cannot be kept; see `call`."""
        out_of_memory = any(not reply["ok"] and reply["error"]["out_of_memory"] for reply in call.replies.values())
        with self._changed:
            self._changed.wait_for(
                lambda: len(call.replies) == len(self._workers) or self._failing,
                timeout=_GRACE_OUT_OF_MEMORY_S if out_of_memory else _GRACE_S,
            )
        if any(worker.gone for worker in self._workers):  # the cause, which its peers' broken connections only follow
            self._raise_first()
        failed = [rank for rank in call.order if not call.replies[rank]["ok"]]
        errors = [call.replies[rank]["error"] for rank in failed]
        first = verdict.first_cause(errors)
        kept = False
        if len(failed) == len(self._workers):
            replies = call.replies.values()
            kept = verdict.refused_alike(replies) or (verdict.short_of_memory(replies) and self._recovers())
        error = self._remote_error(self._workers[failed[first]], call.operation, errors[first], kept)
        for rank, detail in zip(failed, errors, strict=True):
            log.log(logging.INFO if detail["expected"] else logging.ERROR, "%s", _prefixed(rank, detail["traceback"]))
        if not kept:
            self._fail_with(error)
        self._call = None
        if isinstance(error, WorkerOutOfMemoryError):
            status.tell(status.OUT_OF_MEMORY, str(error))
        raise error

    def _recovers(self) -> bool:
        """Whether all ranks free what the failed operation has left there, and their devices compute, in `_PROBE_S`."""
        call = self._send(Recover())
        deadline = time.monotonic() + _PROBE_S
        with contextlib.suppress(EngineError):  # one has died of it, or somebody has stopped them
            while time.monotonic() < deadline:
                if self._when(lambda: len(call.replies) == len(self._workers) or self._failed_reply(call)):
                    break
        return len(call.replies) == len(self._workers) and not self._failed_reply(call)

    def _remote_error(
        self,
        worker: WorkerProcess,
        operation: str,
        error: dict[str, Any],
        kept: bool,
        advice: str = "Use a smaller size or fewer frames, more devices, weights 'offload', or an fp8 weight_dtype",
    ) -> WorkerError:
        kind = WorkerOutOfMemoryError if error["out_of_memory"] else WorkerError
        if error["expected"] and kept:
            text = error["message"]
        else:
            text = f"{worker.describe()} failed in '{operation}': {error['type']}: {error['message']}"
            text += f" (memory in use there: {worker.memory / 2**20:.0f} MiB)"
        if error["out_of_memory"]:
            text += f". {advice}"
        elif not error["expected"] and "cuda error" in error["message"].lower():
            text += ". The GPU takes no more work from this process; if it comes back, look for 'Xid' in dmesg"
        if not kept:
            text += ". The workers were stopped; the next prompt starts fresh ones"
        return kind(
            text,
            rank=worker.rank,
            remote_type=error["type"],
            remote_traceback=_prefixed(worker.rank, error["traceback"]),
        )

    def _fail_stuck(self, operation: str, stuck: Stuck) -> NoReturn:
        names = " or ".join(worker.describe() for worker in stuck.workers)
        text = (
            f"{names} stopped answering in '{operation}': {stuck.reason}{self._advice}. The workers were stopped; the"
            " next prompt starts fresh ones"
        )
        self._fail_with(WorkerDiedError(text, rank=stuck.workers[0].rank))

    @property
    def _advice(self) -> str:
        """What silent GPUs most often mean."""
        if self.layout.device_type != "cuda" or self.layout.world_size == 1:
            return ""
        return (
            "; often such GPUs cannot reach each other directly: start ComfyUI with the environment variable"
            " NCCL_P2P_DISABLE=1 (NCCL_DEBUG=INFO tells more)"
        )

    def _fail_with(self, failure: WorkerError) -> NoReturn:
        """As `_lose`; raises this failure, or the one that came first."""
        self._lose(failure)
        self._raise_first()
        raise failure

    def _raise_first(self) -> None:
        """Raises the failure that another thread is about to make known."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._closing, timeout=2 * REAP_S)
        self._raise_failure()

    def _lose(self, failure: WorkerError) -> None:
        """Ends the processes, since peers would wait for a lost one in a collective, and makes the failure known: once,
        where a second rank reports what the first one caused. Its message then also names what could not be ended."""
        with self._changed:
            if self._failing or self._closing:
                return
            self._failing = True
        left_behind = self._supervisor.kill()
        failure.args = (". ".join([str(failure), *(worker.describe_left_behind() for worker in left_behind)]),)
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        out_of_memory = isinstance(failure, WorkerOutOfMemoryError)
        status.tell(status.OUT_OF_MEMORY if out_of_memory else status.CRASHED, str(failure))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure = self._failure
            self.stop()
            raise failure
        if self._closing:
            raise EngineError(self._stopped)

    # --- what the supervisor tells ------------------------------------------------------------------------------

    def _on_message(self, worker: WorkerProcess, message: Message) -> None:
        if message.get("event") == "progress":
            if self._call is not None:
                self._call.progress[worker.rank] = (message["done"], message["total"])
            return
        for name in ("memory", "free", "cached"):
            if name in message:  # a device that has failed does not say
                setattr(worker, name, message[name])
        if (task := self._tasks.pop(message["id"], None)) is not None:
            task.reply = {"memory": worker.memory, **message}
            if message["ok"] and message["result"] is not None:  # it gives a sign of life when it begins
                self._pace.measured(task.work, message["result"].get("seconds", 0.0))
        if self._call is not None and message["id"] == self._call.number:
            self._call.replies[worker.rank] = message
            self._call.order.append(worker.rank)

    def _on_end(self, worker: WorkerProcess) -> None:
        if not self._closing and not self._failing:
            text = worker.describe_end(self._busy_with(worker.rank))
            self._fail(WorkerDiedError(text + ". The next prompt starts fresh workers", rank=worker.rank))

    def _on_blocked(self, worker: WorkerProcess) -> None:
        words = in_words(state(worker.process.pid))
        text = f"{worker.describe()} has read nothing of what it was sent for {SEND_TIMEOUT_S:g} s ({words})"
        self._fail(WorkerDiedError(text + ". The next prompt starts fresh workers", rank=worker.rank))

    def _on_supervisor_failure(self, error: Exception) -> None:
        self._fail(WorkerDiedError(f"the workers could not be supervised: {error}", rank=len(self._workers)))

    def _busy_with(self, rank: int) -> str | None:
        if self._call is not None:
            return self._call.operation
        return next((task.operation for task in list(self._tasks.values()) if task.rank == rank), None)

    def _fail(self, failure: WorkerError) -> None:
        """As `_lose`, where nobody may be waiting for an answer."""
        self._lose(failure)
        if self._failure is failure:
            log.error("%s", failure)


def _threads_per_worker(layout: Layout) -> int:
    """A CPU worker gets its share of this process's own threads, so that `OMP_NUM_THREADS` counts for both; on several
    CPU models PyTorch's convolutions give other bits with another number of threads."""
    if layout.device_type == "cpu":
        return max(1, torch.get_num_threads() // layout.world_size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores // layout.world_size))  # a GPU worker only reads files and launches kernels


def _prefixed(rank: int, text: str) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in text.rstrip().splitlines())
