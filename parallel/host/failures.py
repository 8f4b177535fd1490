"""How a group fails: what the error says, and that everybody hears of the first one."""

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
"""What a user can do when the memory is short."""


def advice_after(mode: str | None) -> str:
    """The same, where `auto` takes another mode of weights for the next prompt."""
    if mode is None:
        return ADVICE
    return (
        f"The next prompt takes weights '{mode}' (as weights is 'auto'), which leaves more memory to a step. Use a"
        " smaller size or fewer frames, more devices, or an fp8 weight_dtype if that is not enough"
    )


class Fate:
    """Whether a group's workers can be used, or what has ended them: a failure, or somebody who stopped them.

    Args:
        supervisor: of the workers.
        end: ends the group; called in a thread that hears of the failure.

    Attributes:
        failure: the first one, once it is known.
        failing: a failure is known, or is about to be.
        stopped: why somebody has stopped the workers; empty while nobody has.
    """

    def __init__(self, supervisor: Supervisor, end: Callable[[], None]):
        self.failure: WorkerError | None = None
        self.failing = False
        self.stopped = ""
        self._supervisor, self._changed, self._end = supervisor, supervisor.changed, end

    def stop(self, reason: str) -> bool:
        """From now on calls fail for this reason. False if somebody has stopped the workers before."""
        with self._changed:
            if self.stopped:
                return False
            self.stopped = reason
            return True

    def check(self) -> None:
        """Raises what has ended the workers, if anything has.

        Raises:
            WorkerError: the failure.
            EngineError: somebody has stopped them.
        """
        if self.failure is not None:
            self._end()
            raise self.failure
        if self.stopped:
            raise EngineError(self.stopped)

    def check_pending(self) -> None:
        """As `check`, where another thread is about to make a failure known."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or bool(self.stopped), timeout=2 * REAP_S)
        self.check()

    def lose(self, failure: WorkerError) -> None:
        """Ends the processes, since peers would wait for a lost one in a collective, and makes the failure known: once,
        where a second rank reports what the first one caused. Its message then also names what could not be ended, and
        the group's log file."""
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
        log_file.write(text)  # nobody waits for the disk
        out_of_memory = isinstance(failure, WorkerOutOfMemoryError)
        status.tell(status.OUT_OF_MEMORY if out_of_memory else status.CRASHED, str(failure))

    def lose_and_raise(self, failure: WorkerError) -> NoReturn:
        """As `lose`; raises this failure, or the one that came first."""
        self.lose(failure)
        self.check_pending()
        raise failure

    def lose_unasked(self, rank: int, text: str) -> None:
        """As `lose`, where nobody may be waiting for an answer."""
        failure = WorkerDiedError(text, rank=rank)
        self.lose(failure)
        if self.failure is failure:
            log.error("%s", str(failure))  # handlers may keep what they are given, and with it the group


def not_started(
    workers: Sequence[WorkerProcess], layout: Layout, seconds: float, stuck: Stuck | None = None
) -> WorkerDiedError:
    """Of workers that are late, or known not to go on, at the start of a group."""
    late = [worker for worker in workers if not worker.ready] if stuck is None else stuck.workers
    names = ", ".join(worker.describe() for worker in late) or "the workers"
    said = late[0].output_so_far() if late else ""
    why = f"did not start within {seconds:.0f} s" if stuck is None else f"did not start: {stuck.reason}"
    text = f"{names} {why}{_advice_on_silence(layout)}{said}"
    return WorkerDiedError(text, rank=late[0].rank if late else 0)


def stuck(found: Stuck, layout: Layout, operation: str) -> WorkerDiedError:
    """Of workers that do not go on."""
    names = " or ".join(worker.describe() for worker in found.workers)
    text = f"{names} stopped answering in '{operation}': {found.reason}{_advice_on_silence(layout)}{_FRESH}"
    return WorkerDiedError(text, rank=found.workers[0].rank)


def raised(worker: WorkerProcess, operation: str, failure: Failure, *, kept: bool, advice: str = ADVICE) -> WorkerError:
    """Of an exception in a worker.

    Args:
        kept: whether the group stays usable.
        advice: what a user can do when it was the memory.
    """
    if failure.expected and kept:
        text = failure.message
    else:
        text = f"{worker.describe()} failed in '{operation}': {failure.type}: {failure.message}"
        text += f" (memory in use there: {worker.memory.used / 2**20:.0f} MiB)"
    if failure.out_of_memory:
        text += f". {advice}"
    elif not failure.expected and "cuda error" in failure.message.lower():
        text += ". The GPU takes no more work from this process; if it comes back, look for 'Xid' in dmesg"
    kind = WorkerOutOfMemoryError if failure.out_of_memory else WorkerError
    return kind(
        text if kept else text + _FRESH,
        rank=worker.rank,
        remote_type=failure.type,
        remote_traceback=prefixed(worker.rank, failure.traceback),
        lost=not kept,
    )


def prefixed(rank: int, text: str) -> str:
    """A worker's text, each line with its rank."""
    return "\n".join(f"[rank {rank}] {line}" for line in text.rstrip().splitlines())


def report_left_behind(workers: Iterable[WorkerProcess], log_file: GroupLog) -> None:
    """Tells of processes that could not be ended."""
    if text := ". ".join(worker.describe_left_behind() for worker in workers):
        log.error("%s", text)
        log_file.write(text)
        status.tell(status.CRASHED, text)


def _advice_on_silence(layout: Layout) -> str:
    """What silent GPUs most often mean."""
    if layout.device_type != "cuda" or layout.world_size == 1:
        return ""
    return (
        "; often such GPUs cannot reach each other directly: start ComfyUI with the environment variable"
        " NCCL_P2P_DISABLE=1 (NCCL_DEBUG=INFO tells more)"
    )
