"""Timing on a machine that others use too: runs are interleaved, and rounds that other load disturbed are repeated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_ALLOWED_LOAD = 0.08
"""Cores that other processes may use during a round before it counts as disturbed."""
_TRIES = 4


class QuietRounds:
    """Timer of several runs in turn, which repeats a round if other processes kept the CPU busy meanwhile.

    Args:
        pids: the processes that are being measured.
    """

    def __init__(self, pids: Sequence[int]):
        self._pids = list(pids)
        self.disturbed = 0
        """Number of tries of a round that other processes disturbed."""

    def run(self, runs: Sequence[Callable[[], T]]) -> list[tuple[T, float]]:
        """Runs one round; returns each run's result and seconds, from the least disturbed of up to `_TRIES` tries."""
        best: tuple[float, list[tuple[T, float]]] | None = None
        for _ in range(_TRIES):
            before, began = self._foreign_seconds(), time.perf_counter()
            results = []
            for run in runs:
                start = time.perf_counter()
                results.append((run(), time.perf_counter() - start))
            load = (self._foreign_seconds() - before) / (time.perf_counter() - began)
            if best is None or load < best[0]:
                best = load, results
            if load <= _ALLOWED_LOAD:
                break
            self.disturbed += 1
        assert best is not None
        return best[1]

    def _foreign_seconds(self) -> float:
        """Returns the CPU seconds spent so far on other processes of this machine, and stolen by its hypervisor."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:  # not Linux: the load is unknown, so no round is repeated
            return 0.0
        user, nice, system, _, _, irq, softirq, steal = fields
        busy = (user + nice + system + irq + softirq + steal) / _TICKS_PER_S
        return busy - sum(_cpu_seconds(pid) for pid in self._pids)


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
