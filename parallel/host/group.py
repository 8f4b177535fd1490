"""A group of worker processes, one per device: started once, called many times, ended together.

Threads: each group has a supervisor thread, which starts the processes and reads their messages and output. Calls run
in the caller's thread.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch

from .. import __version__
from ..config import Layout
from ..wire.control import ControlPage
from . import failures, status
from .calls import Calls, Poll
from .failures import Fate
from .pace import FIRST_START_S, Pace, Watch
from .process import WorkerProcess
from .supervisor import LEAVE_S, Supervisor

log = logging.getLogger("sequence_parallel")

_starts = Pace(unknown=FIRST_START_S)
"""Start times of the groups of this process, by number of workers."""


class WorkerGroup(Calls):
    """The worker processes of one layout.

    Args:
        layout: devices and degrees.
        threads: number of CPU threads of each worker; by default an equal share of the host's threads (CPU workers) or
            cores (GPU workers, at most 4).
        first: recipe of the model that will be loaded first, if known: workers import its library while they join the
            process group.

    Attributes:
        number: unique number of the group.
        figures: weights that it holds and figures of its last step, for observers.
    """

    _numbers_of_groups = itertools.count(1)

    def __init__(self, layout: Layout, threads: int | None = None, first: Mapping[str, Any] | None = None):
        self.first = first
        self.number = next(self._numbers_of_groups)
        self.figures = status.GroupFigures()
        control = ControlPage.create()
        supervisor = Supervisor(
            layout,
            threads or _threads_per_worker(layout),
            control.fileno(),
            first,
            on_message=self._on_message,
            on_end=self._on_end,
            on_loss=self._on_loss,
        )
        super().__init__(layout, supervisor, Fate(supervisor, self.stop), control)

    # --- start and end ----------------------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Starts the processes and waits until all have joined the process group.

        Raises:
            WorkerDiedError: a worker could not start; the message ends with its last lines of output.
        """
        began = time.monotonic()
        where = f"on {self.layout.describe()} ({self.layout.reason}), attention {self.layout.attention}"
        versions = f"Sequence Parallel {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
        log_file = self._supervisor.log_file
        log_file.write(f"starting workers {where}: {versions}")
        self._supervisor.start()
        atexit.register(self.stop)
        watch = Watch(lambda: math.inf)  # detects only halted processes
        patience = _starts.patience(self.layout.world_size)
        beats = self._control.beats(self.layout.world_size)  # no beats before the workers have joined
        try:
            while not self._when(lambda: sum(worker.ready for worker in self.workers) == self.layout.world_size):
                if poll is not None:
                    poll()
                found = watch.look([worker for worker in self.workers if not worker.ready], beats)
                if found is not None or time.monotonic() - began > patience:
                    failure = failures.not_started(self.workers, self.layout, time.monotonic() - began, found)
                    self._fate.lose_and_raise(failure)
        except BaseException:
            self.stop()
            raise
        self.figures.started([worker.start_seconds for worker in self.workers])
        seconds, phases = time.monotonic() - began, status.phases_text(self.figures.start)
        _starts.measured(self.layout.world_size, seconds)
        log.info("workers started in %.1f s (%s) on %s", seconds, phases, self.layout.describe())
        ranks = ", ".join(f"{worker.describe()}: {worker.title}" for worker in self.workers)
        log_file.write(f"workers started in {seconds:.1f} s ({phases}): {ranks}")
        self.last_used = time.monotonic()

    def stop(self, reason: str = "the workers were stopped") -> None:
        """Ends the processes. May be called repeatedly and from any thread.

        Args:
            reason: message of the error that a running call raises.
        """
        if not self._fate.stop(reason):
            return
        atexit.unregister(self.stop)
        busy = self._fate.failure is not None or self._call is not None or self._tasks
        log_file = self._supervisor.log_file
        log_file.write(reason)
        left_behind = self._supervisor.end(0.0 if busy else LEAVE_S)
        if not self._fate.failing:  # else the failure's message names them
            failures.report_left_behind(left_behind, log_file)
        # Let a thread in the middle of a call leave it first: the call uses what is closed here.
        alone = self._lock.acquire(timeout=LEAVE_S)
        try:
            self._supervisor.close()
            self.memory.close()
            self._control.close()
        finally:
            if alone:
                self._lock.release()

    @property
    def alive(self) -> bool:
        """True if all workers have joined, none has failed, and the group has not been stopped."""
        everyone = self._supervisor.running == self.layout.world_size
        return everyone and self._fate.failure is None and not self._fate.stopped

    # --- for observers ----------------------------------------------------------------------------------------------

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers]

    @property
    def titles(self) -> list[str]:
        """Device name of each worker, e.g. the model of its GPU."""
        return [worker.title for worker in self.workers]

    def cached_on(self, device: str) -> int:
        """Returns the bytes of a GPU that its worker's allocator caches without using them, as of the last reply."""
        return sum(worker.memory.cached for worker in self.workers if worker.device.name == device)

    @property
    def busy(self) -> bool:
        """True if an operation runs, a cancelled one included."""
        return bool(self._open())

    def status(self) -> dict[str, Any]:
        """Returns the state of each worker and the group's figures (`GroupFigures.to_json`) as plain data.

        Sends nothing to the workers; may be called from any thread at any time.
        """
        failure, running = self._fate.failure, self._open()
        state = "idle"
        if failure is not None:
            state = "dead"
        elif self._fate.stopped:
            state = "stopped"
        elif not self.alive:
            state = "starting"
        elif running:
            state = running[0].operation
        return {
            "id": self.number,
            "devices": self.layout.describe(),
            "chosen": self.layout.reason,
            "state": state,
            "failure": None if failure is None else str(failure),
            "ranks": [self._rank_status(worker, state) for worker in list(self.workers)],
            **self.figures.to_json(),
        }

    def _rank_status(self, worker: WorkerProcess, state: str) -> dict[str, Any]:
        call, rank, failure, silent = self._call, worker.rank, self._fate.failure, self._silent()
        if state == "dead":
            state = "dead" if failure is not None and failure.rank == rank else "stopped"
        elif state == "starting":
            state = "ready" if worker.ready else "starting"
        elif silent and rank not in silent:
            state = "waiting"
        return {
            "rank": rank,
            "pid": worker.process.pid,
            "state": state,
            "progress": call.progress.get(rank) if call is not None else None,
            "weights": min(self.figures.weights, worker.memory.used),
            **worker.device_status(),
            **self.figures.of_rank(rank),
        }


def _threads_per_worker(layout: Layout) -> int:
    """Returns the number of CPU threads of each worker.

    CPU workers divide the thread count of this process among them, so that `OMP_NUM_THREADS` applies to host and
    workers; on several CPU models PyTorch's convolutions are not bit-identical for different numbers of threads.
    """
    if layout.device_type == "cpu":
        return max(1, torch.get_num_threads() // layout.world_size)
    cores = len(os.sched_getaffinity(0))
    return min(4, max(1, cores // layout.world_size))  # a GPU worker only reads files and launches kernels
