"""Log file of a worker group: what its workers print and log, and the host's lines about the group."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

log = logging.getLogger("sequence_parallel")

MAX_BYTES = 2**20
"""Size at which the file is renamed to `….log.1`, replacing the previous one."""
_LONGEST_NAME = 200

_folder: Path | None = None
_refused: set[Path] = set()
"""Folders that could not be written to; each is reported once."""


def keep_in(folder: Path | None) -> None:
    """Sets the folder of the log files of groups started from now on; None, the default, writes none."""
    global _folder
    _folder = folder


def folder() -> Path | None:
    """Returns the folder set by `keep_in`."""
    return _folder


class GroupLog:
    """The log file of one group.

    Its name is derived from the devices, so a later group on the same devices continues the file. An unwritable folder
    is reported once in the host's log; the group then runs without a file. Thread-safe.

    Args:
        devices: names of the workers' devices, by rank.

    Attributes:
        path: the file; None if there is none, or none can be written.
    """

    def __init__(self, devices: Sequence[str]):
        name = "-".join(["workers", *(device.replace(":", "") for device in devices)])
        self.path = None if _folder is None else _folder / f"{name[:_LONGEST_NAME]}.log"
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._closed = False

    def write(self, text: str, rank: int | None = None) -> None:
        """Appends the lines of `text`, each with the time and `[rank N]`, or `[host]` without a rank."""
        who = "host" if rank is None else f"rank {rank}"
        with self._lock:
            if self.path is None or self._closed:
                return
            try:
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = _File(self.path)
                for line in text.splitlines():
                    record = logging.LogRecord("", logging.INFO, "", 0, "[%s] %s", (who, line), None)
                    self._file.emit(record)
            except OSError as error:
                refused, self.path = self.path.parent, None
                self._close()
                if refused not in _refused:
                    _refused.add(refused)
                    log.warning("the workers' log cannot be written to %s: %s", refused, error)

    def close(self) -> None:
        """Closes the file; what is written later is dropped."""
        with self._lock:
            self._closed = True
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._file.close()


class _File(RotatingFileHandler):
    def __init__(self, path: Path):
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", errors="replace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that is being handled; `GroupLog.write` reports it
