"""Thread that starts a group's processes and reads all their messages and output.

It blocks in `select`, so an idle group costs no CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..config import Layout
from ..wire.channel import ChannelBlocked, ChannelClosed, ChannelGarbled, Message
from .group_log import GroupLog
from .process import SEND_TIMEOUT_S, WorkerProcess
from .process_state import in_words, state

log = logging.getLogger("sequence_parallel")

LEAVE_S = 2.0
"""Time that idle workers have to end by themselves."""
REAP_S = 5.0
"""Time that killed workers have to end: the system unmaps all their memory first, including page-locked memory."""


class Supervisor:
    """Processes of one layout, and the thread that reads them.

    Args:
        layout: devices and degrees.
        threads: number of CPU threads of each worker.
        control: descriptor of the control page.
        first: recipe of the model that they will load first, if known.
        on_message: called with a worker's reply or progress, while `changed` is held.
        on_end: called with a worker that has ended without being asked to.
        on_loss: called with a rank and the reason why it, or every rank, is unusable: it does not read its messages
            (called in the sender's thread), it sends invalid data, or this thread has failed.

    Attributes:
        workers: workers that have been started, by rank.
        changed: condition, notified after every message from a worker.
        log_file: log file for the output and log records of the workers, and for the host's lines about them.
    """

    def __init__(
        self,
        layout: Layout,
        threads: int,
        control: int,
        first: Mapping[str, Any] | None,
        *,
        on_message: Callable[[WorkerProcess, Message], None],
        on_end: Callable[[WorkerProcess], None],
        on_loss: Callable[[int, str], None],
    ):
        self.workers: list[WorkerProcess] = []
        self.changed = threading.Condition()
        self.log_file = GroupLog([device.name for device in layout.devices])
        self._layout, self._threads, self._control, self._first = layout, threads, control, first
        self._tell_message, self._tell_end, self._tell_loss = on_message, on_end, on_loss
        self._ending = False
        self._posted: deque[Message] = deque()
        self._store = os.memfd_create("sequence-parallel:store")
        self._common = os.memfd_create("sequence-parallel:common")
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="sequence-parallel", daemon=True)

    @property
    def running(self) -> int:
        """Number of workers that have joined the others and have not ended."""
        return sum(worker.ready and not worker.gone for worker in self.workers)

    def start(self) -> None:
        self._thread.start()

    def send(self, rank: int, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Sends a message to one rank. Ignores a worker that has ended: its closed socket leads to `on_end`."""
        worker = self.workers[rank]
        try:
            worker.channel.send(message, fds)
        except ChannelBlocked:
            words = in_words(state(worker.process.pid))
            text = f"{worker.describe()} has read nothing of what it was sent for {SEND_TIMEOUT_S:g} s ({words})"
            self._tell_loss(rank, text)
        except ChannelClosed:
            pass

    def post(self, message: Message) -> None:
        """Has the supervisor's thread send a message to all workers: takes no lock and does not wait."""
        self._posted.append(message)
        self._wake()

    def kill(self) -> list[WorkerProcess]:
        """Kills the workers at once.

        Returns:
            Workers that have not ended within `REAP_S`.
        """
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.process.kill()
        deadline = time.monotonic() + REAP_S
        return [worker for worker in self.workers if not worker.reap(deadline)]

    def end(self, patience: float) -> list[WorkerProcess]:
        """Ends the workers, and then the thread.

        Args:
            patience: seconds that the workers have to end by themselves; 0 kills them without asking.

        Returns:
            Workers that could not be ended.
        """
        self._ending = True
        if patience:
            for rank in range(len(self.workers)):
                self.send(rank, {"op": "stop"})
            self._wait_for_ends(patience)
        left = self.kill()
        self._wake()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * REAP_S)
        return left

    def close(self) -> None:
        """Closes all descriptors and the log file; must be called after `end`."""
        for descriptor in (self._store, self._common, self._wake_read, self._wake_write):
            os.close(descriptor)
        self.log_file.close()
        self._wake_write = -1  # a late `post` must not write to another file that reuses this descriptor

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Starts the processes and reads from them; in one thread, because they die with the one that started them."""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake_read, selectors.EVENT_READ, None)
                for rank in range(self._layout.world_size):
                    if self._ending:
                        break
                    worker = WorkerProcess(
                        rank,
                        self._layout,
                        threads=self._threads,
                        store=self._store,
                        common=self._common,
                        control=self._control,
                        first=self._first,
                        log_file=self.log_file,
                    )
                    self.workers.append(worker)
                    selector.register(worker.channel, selectors.EVENT_READ, (worker, self._on_message))
                    selector.register(worker.output, selectors.EVENT_READ, (worker, self._on_output))
                self._listen(selector)
        except Exception as error:
            log.exception("the supervisor of the workers failed")
            self._tell_loss(len(self.workers), f"the workers could not be supervised: {error}")
        self._wait_for_ends(2 * LEAVE_S)  # they die with this thread, so it waits until they have ended
        for worker in self.workers:
            worker.close()

    def _wait_for_ends(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        for worker in self.workers:
            if not worker.left_behind:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))

    def _listen(self, selector: selectors.BaseSelector) -> None:
        while not self._ending:
            for key, _ in selector.select():
                if key.data is None:
                    os.read(self._wake_read, 64)
                    self._send_posted()
                    continue
                worker, handler = key.data
                if not handler(worker):
                    selector.unregister(key.fileobj)

    def _send_posted(self) -> None:
        while self._posted:
            message = self._posted.popleft()
            for rank in range(len(self.workers)):
                self.send(rank, message)

    def _on_message(self, worker: WorkerProcess) -> bool:
        try:
            message, fds = worker.channel.receive()
        except ChannelGarbled as error:
            self._tell_loss(worker.rank, f"{worker.describe()} has sent data that is not a message ({error})")
            return False
        except ChannelClosed:
            worker.gone = True
            if not self._ending:
                self._tell_end(worker)
            return False
        for fd in fds:
            os.close(fd)
        try:
            with self.changed:
                written = self._understand(worker, message)
                self.changed.notify_all()
        except (KeyError, TypeError, ValueError) as error:
            self._tell_loss(worker.rank, f"{worker.describe()} has sent a message that makes no sense ({error})")
            return False
        if written:
            self.log_file.write(written, worker.rank)
        return True

    def _understand(self, worker: WorkerProcess, message: Message) -> str:
        """Handles one message; returns the text to write to the group's log file, or an empty string.

        Raises:
            KeyError, TypeError, ValueError: the message is not one that workers send, or is a reply to no open call.
        """
        if message.get("event") == "ready":
            worker.ready, worker.title, worker.total = True, message["title"], message["total"]
            worker.start_seconds = message["seconds"]
            return ""
        if message.get("event") == "log":
            log.log(message["level"], "[rank %d] %s", worker.rank, message["text"])
            return f"{logging.getLevelName(message['level'])}: {message['text']}"
        self._tell_message(worker, message)
        error = message.get("error")
        return error["traceback"] if error else ""

    def _on_output(self, worker: WorkerProcess) -> bool:
        lines = worker.read_output()
        for line in lines or ():
            log.debug("[rank %d] %s", worker.rank, line)
        return lines is not None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")
