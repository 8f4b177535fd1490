"""One worker process: starts it and describes how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import numerics
from ..config import Layout, WorkerDevice
from ..wire import source_files
from ..wire.channel import Channel, ChannelClosed
from ..wire.control import SIZE as CONTROL_SIZE
from ..wire.messages import MemoryUse
from .environment import initial_environment, worker_environment
from .group_log import GroupLog
from .process_state import in_words, state

SEND_TIMEOUT_S = 60.0
"""Longest time in which a worker may read nothing: its socket has a reader thread, independent of computation."""
_RECEIVE_TIMEOUT_S = 8.0
"""Timeout for the rest of a message after its first byte: workers send each message in one piece."""
_CLOSING_S = 2.0
"""Time that a process has to end by itself after its socket has closed."""

_BOOT = Path(__file__).resolve().parent.parent / "worker" / "boot.py"


class WorkerProcess:
    """The process of one rank, started by the constructor. It dies with the *thread* that started it.

    Args:
        rank: its rank in the world.
        layout: devices and degrees of the world.
        threads: number of its CPU threads.
        store: descriptor of the file store through which the ranks form their process group.
        common: descriptor of the common memory of CPU ranks.
        control: descriptor of the control page.
        first: recipe of the model that it will load first, if known.
        log_file: receives the lines of its output.

    Attributes:
        ready: True once it has joined the other ranks.
        start_seconds: seconds of each phase of its start, in order: python, torch (with this pack's modules), device,
            meeting.
        gone: True once it has ended.
        left_behind: True if it did not end when it was killed; it is not waited for any more.
        memory: its memory use, as last reported.
        total: bytes of memory of its GPU, or of the system.
        title: display name of its device.
        last_lines: last lines of its output.
    """

    def __init__(
        self,
        rank: int,
        layout: Layout,
        *,
        threads: int,
        store: int,
        common: int,
        control: int,
        first: Mapping[str, Any] | None,
        log_file: GroupLog,
    ):
        self.rank = rank
        self.device: WorkerDevice = layout.devices[rank]
        self.ready = False
        self.gone = False
        self.left_behind = False
        self.memory = MemoryUse(used=0, free=None, cached=0)
        self.total = 0
        self.title = ""
        self.start_seconds: dict[str, float] = {}
        self.last_lines: deque[str] = deque(maxlen=30)
        self._unfinished = ""
        self._log_file = log_file
        ours, theirs = socket.socketpair()
        settings = {
            "fd": theirs.fileno(),
            "host_pid": os.getpid(),
            "rank": rank,
            "weights": layout.speeds,
            "device": self.device.name,
            "attention": layout.attention,
            "store": store,
            "common": common,
            "threads": threads,
            "switches": numerics.read(),
            "source": source_files.AT_IMPORT,
            "first": first,
            "started": time.monotonic(),
        }
        flags = ["-s"] if sys.flags.no_user_site else []
        try:
            self.process = subprocess.Popen(  # noqa: S603 (this interpreter, our own script, no shell)
                [sys.executable, *flags, str(_BOOT), json.dumps(settings)],
                pass_fds=(theirs.fileno(), store, common),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=worker_environment(os.environ, initial_environment(), threads=threads, rank=rank),
            )
        finally:
            theirs.close()
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.channel = Channel(ours, SEND_TIMEOUT_S, _RECEIVE_TIMEOUT_S)
        with contextlib.suppress(ChannelClosed):  # the reader of the channel sees it too, and reports the reason
            page = {"segments": [{"name": "control", "size": CONTROL_SIZE}], "op": "attach", "id": 0}
            self.channel.send(page, (control,))

    def describe(self) -> str:
        return f"worker rank {self.rank} ({self.device.name}, pid {self.process.pid})"

    def device_status(self) -> dict[str, Any]:
        """Returns its device and the memory there, in bytes. On a CPU, `free` is read now; the rest is as reported."""
        return {
            "device": self.device.name,
            "title": self.title,
            "memory": self.memory.used,
            "free": _available_bytes() if self.device.type == "cpu" else self.memory.free,
            "total": self.total,
        }

    def read_output(self) -> list[str] | None:
        """Returns the complete lines written since the last call; None once its output has closed."""
        text = os.read(self.output.fileno(), 65536).decode(errors="replace")
        *lines, self._unfinished = (self._unfinished + (text or "\n")).split("\n")
        self.last_lines.extend(lines)
        for line in lines:
            self._log_file.write(line, self.rank)
        return lines if text else None

    def describe_end(self, operation: str | None) -> str:
        """Describes why the process ended, from its exit code. Its socket has closed, so it should be about to end.

        Args:
            operation: name of the operation that it was running; None if it was idle.
        """
        during = "" if operation is None else f" during '{operation}'"
        try:
            code = self.process.wait(timeout=_CLOSING_S)
        except subprocess.TimeoutExpired:
            return f"{self.describe()} has closed its connection{during}"
        with contextlib.suppress(BlockingIOError, OSError):
            while self.read_output() is not None:
                pass
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        text = f"{self.describe()} {how}{during}"
        if self.memory.used:
            text += f"; it had {self.memory.used / 2**20:.0f} MiB in use"
        if code == -signal.SIGKILL:
            text += "; if nobody ended it, the system ran out of memory (see dmesg)"
        elif code == -signal.SIGBUS:
            text += "; a file that it had mapped, such as the model's, was cut or cannot be read any more"
        elif code > 0 or not self.ready:
            text += self.output_so_far()
        return text

    def reap(self, deadline: float) -> bool:
        """Waits for the end of a process that has been killed. If it does not end, later calls only check.

        Args:
            deadline: latest time to wait for, on the clock of `time.monotonic`.

        Returns:
            True if it has ended; False if not, and it is left behind.
        """
        patience = 0.0 if self.left_behind else max(0.0, deadline - time.monotonic())
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.left_behind = True
            return False
        return True

    def describe_left_behind(self) -> str:
        """Describes a process that SIGKILL does not end, and what the user can do."""
        letter = state(self.process.pid)
        text = f"{self.describe()} does not end, not even by SIGKILL, and was left behind ({in_words(letter)})"
        if self.device.type != "cuda":
            return text
        return (
            f"{text}. Most often the driver of {self.device.name} is stuck: look for 'Xid' or 'NVRM' in dmesg; where"
            " nvidia-smi does not answer or still lists the process, restart the machine"
        )

    def output_so_far(self) -> str:
        """Returns its last lines of output, to be appended to a message; an empty string if there are none."""
        lines = "\n".join([*self.last_lines, self._unfinished]).rstrip()
        return f"; its last lines:\n{lines}" if lines else ""

    def close(self) -> None:
        """Closes the host's ends of its socket and its output."""
        self.channel.close()
        self.output.close()


def _available_bytes() -> int | None:
    """Returns the bytes of system memory available without swapping; None if the system does not report them."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
