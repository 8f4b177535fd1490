"""Failures of workers, as a test orders them."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from parallel.host import process
from tests.distributed.faulty_boot import FILE

BOOT = Path(__file__).with_name("faulty_boot.py")


class Faults:
    """Orders failures of the workers that are started from here on; on a CPU and on CUDA devices.

    Args:
        path: of a file that these workers look at whenever they pass a place where they can fail.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        self._path = path
        self._numbers = itertools.count(1)
        monkeypatch.setenv(FILE, str(path))
        monkeypatch.setattr(process, "_BOOT", BOOT)

    def order(self, kind: str, ranks: Iterable[int] = (), place: str = "before block", count: int = 3, **at: str):
        """From now on the ranks fail.

        Args:
            kind: of `faulty_boot`.
            place: `before` or `after` one of `start`, `meeting`, `parameter`, `LoRA`, `self-check`, `compile`, `block`,
                `exchange`, `pass`, `check`, `echo`, `unload`.
            count: when they pass the place for this time.
            at: `rank0="after exchange"` and the like, for ranks that fail elsewhere.
        """
        places = {rank: place for rank in ranks} | {int(name.removeprefix("rank")): where for name, where in at.items()}
        fault = {"id": str(next(self._numbers)), "kind": kind, "places": places, "count": count}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(fault))
        new.replace(self._path)  # workers see all of it or nothing

    def clear(self) -> None:
        """Nobody fails any more; what is broken stays broken."""
        self._path.unlink(missing_ok=True)


class Unkillable(subprocess.Popen):
    """A process in uninterruptible sleep, as its parent sees it: signals do nothing, and it never ends.

    Only while `holds`.
    """

    holds = True

    def send_signal(self, sig: int) -> None:
        if not self.holds:
            super().send_signal(sig)

    def poll(self) -> int | None:
        return None if self.holds else super().poll()

    def wait(self, timeout: float | None = None) -> int:
        if not self.holds:
            return super().wait(timeout)
        time.sleep(3600 if timeout is None else timeout)
        raise subprocess.TimeoutExpired(self.args, timeout or 0.0)

    def let_go(self) -> None:
        """It can be ended again, and is."""
        self.holds = False
        self.kill()
        self.wait(timeout=10)


def make_unkillable(which: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on the worker of this rank is started `Unkillable`, once; it is in the returned list then."""
    started: list[Any] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        if started or json.loads(command[-1])["rank"] != which:
            return popen(command, **options)
        started.append(Unkillable(command, **options))
        return started[0]

    monkeypatch.setattr(process.subprocess, "Popen", start)
    return started
