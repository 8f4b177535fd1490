"""Failures of a worker group: texts of the errors, and publication of the first failure to all threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from ..config import Layout
from ..errors import EngineError, WorkerDiedError, WorkerError, WorkerOutOfMemoryError
from ..wire.messages import Failure
from . import status
from .group_log import GroupLog
from .pace import Stuck
from .process import WorkerProcess
from .supervisor import REAP_S, Supervisor

log = logging.getLogger("sequence_parallel")

_FRESH = ". The workers were stopped; the next prompt starts fresh ones"
ADVICE = "Use a smaller size or fewer frames, more devices, weights 'offload', or an fp8 weight_dtype"
"""Advice to a user whose device is out of memory."""


def advice_after(mode: str | None) -> str:
    """Returns advice like `ADVICE`; `mode` is the one `auto` takes for the next prompt, None if it does not change."""
    if mode is None:
        return ADVICE
    return (
        f"The next prompt takes weights '{mode}' (as weights is 'auto'), which leaves more memory to a step. Use a"
        " smaller size or fewer frames, more devices, or an fp8 weight_dtype if that is not enough"
    )


class Fate:
    """State of a group's workers: usable, ended by a failure, or stopped deliberately.

    Args:
        supervisor: supervisor of the workers.
        end: ends the group; called in each thread to which `check` raises the failure.

    Attributes:
        failure: first failure, once its message is complete.
        failing: True from the start of the first failure, before `failure` is set.
        stopped: reason for stopping the workers; empty while they have not been stopped.
    """

    def __init__(self, supervisor: Supervisor, end: Callable[[], None]):
        self.failure: WorkerError | None = None
        self.failing = False
        self.stopped = ""
        self._supervisor, self._changed, self._end = supervisor, supervisor.changed, end

    def stop(self, reason: str) -> bool:
        """Makes calls fail with `reason` from now on; returns False if the workers were stopped before."""
        with self._changed:
            if self.stopped:
                return False
            self.stopped = reason
            return True

    def check(self) -> None:
        """Raises an error if the workers have failed or were stopped.

        Raises:
            WorkerError: the first failure.
            EngineError: the workers were stopped.
        """
        if self.failure is not None:
            self._end()
            raise self.failure
        if self.stopped:
            raise EngineError(self.stopped)

    def check_pending(self) -> None:
        """Waits (at most twice `REAP_S`) for a failure that another thread is about to publish, then calls `check`."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or bool(self.stopped), timeout=2 * REAP_S)
        self.check()

    def lose(self, failure: WorkerError) -> None:
        """Ends all processes, since peers would wait for a lost one in a collective, and publishes the failure.

        Does nothing if the group has already failed or was stopped: a second rank reports a consequence of the first
        failure. Appends the processes that could not be ended, and the path of the group's log file, to the message.
        """
        with self._changed:
            if self.failing or self.stopped:
                return
            self.failing = True
        left_behind = self._supervisor.kill()
        text = ". ".join([str(failure), *(worker.describe_left_behind() for worker in left_behind)])
        log_file = self._supervisor.log_file
        failure.args = (text if log_file.path is None else f"{text}; log: {log_file.path}",)
        failure.left_behind = bool(left_behind)
        with self._changed:
            self.failure = failure
            self._changed.notify_all()
        log_file.write(text)  # after the notification: no thread waits for the disk
        out_of_memory = isinstance(failure, WorkerOutOfMemoryError)
        status.tell(status.OUT_OF_MEMORY if out_of_memory else status.CRASHED, str(failure))

    def lose_and_raise(self, failure: WorkerError) -> NoReturn:
        """Calls `lose`, then raises `failure`, or the one that was published first."""
        self.lose(failure)
        self.check_pending()
        raise failure

    def lose_unasked(self, rank: int, text: str) -> None:
        """Calls `lose` and logs the failure if it is the first, since possibly no thread waits for a reply."""
        failure = WorkerDiedError(text, rank=rank)
        self.lose(failure)
        if self.failure is failure:
            log.error("%s", str(failure))  # handlers may keep their arguments; the exception would keep the group


def not_started(
    workers: Sequence[WorkerProcess], layout: Layout, seconds: float, stuck: Stuck | None = None
) -> WorkerDiedError:
    """Returns the error for workers that are not ready after `seconds`, or are `stuck`, at the start of a group."""
    late = [worker for worker in workers if not worker.ready] if stuck is None else stuck.workers
    names = ", ".join(worker.describe() for worker in late) or "the workers"
    said = late[0].output_so_far() if late else ""
    why = f"did not start within {seconds:.0f} s" if stuck is None else f"did not start: {stuck.reason}"
    text = f"{names} {why}{_advice_on_silence(layout)}{said}"
    return WorkerDiedError(text, rank=late[0].rank if late else 0)


def stuck(found: Stuck, layout: Layout, operation: str) -> WorkerDiedError:
    """Returns the error for workers that make no progress in `operation`."""
    names = " or ".join(worker.describe() for worker in found.workers)
    text = f"{names} stopped answering in '{operation}': {found.reason}{_advice_on_silence(layout)}{_FRESH}"
    return WorkerDiedError(text, rank=found.workers[0].rank)


def raised(worker: WorkerProcess, operation: str, failure: Failure, *, kept: bool, advice: str = ADVICE) -> WorkerError:
    """Returns the error for an exception in a worker.

    Args:
        kept: True if the group stays usable.
        advice: what the user can do if the worker was out of memory.
    """
    if failure.expected and kept:
        text = failure.message
    else:
        text = f"{worker.describe()} failed in '{operation}': {failure.type}: {failure.message}"
        text += f" (memory in use there: {worker.memory.used / 2**20:.0f} MiB)"
    if failure.out_of_memory:
        text += f". {advice}"
    elif not failure.expected and "cuda error" in failure.message.lower():
        text += ". This process can no longer use the GPU; if the error returns, look for 'Xid' in dmesg"
    kind = WorkerOutOfMemoryError if failure.out_of_memory else WorkerError
    return kind(
        text if kept else text + _FRESH,
        rank=worker.rank,
        remote_type=failure.type,
        remote_traceback=prefixed(worker.rank, failure.traceback),
        lost=not kept,
    )


def prefixed(rank: int, text: str) -> str:
    """Returns a worker's text with its rank before each line."""
    return "\n".join(f"[rank {rank}] {line}" for line in text.rstrip().splitlines())


def report_left_behind(workers: Iterable[WorkerProcess], log_file: GroupLog) -> None:
    """Reports processes that could not be ended to the log, the group's log file and the status."""
    if text := ". ".join(worker.describe_left_behind() for worker in workers):
        log.error("%s", text)
        log_file.write(text)
        status.tell(status.CRASHED, text)


def _advice_on_silence(layout: Layout) -> str:
    """Returns the most frequent cause of silent GPUs, and its remedy; empty for CPUs or a single rank."""
    if layout.device_type != "cuda" or layout.world_size == 1:
        return ""
    return (
        "; often the cause is that these GPUs cannot reach each other directly: start ComfyUI with the environment"
        " variable NCCL_P2P_DISABLE=1 (NCCL_DEBUG=INFO prints more)"
    )
