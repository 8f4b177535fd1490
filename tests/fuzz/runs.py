"""Many damaged inputs, one after the other: what was refused, what was accepted, and what it cost."""

from __future__ import annotations

import argparse
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Read = Callable[[random.Random], bool]
"""Damages something by these random numbers and reads it; whether it was accepted. Documented refusals are caught
there, so what is raised is a failure."""


@dataclass
class Costs:
    """CPU seconds, and bytes of memory beyond those at the start, of a `with` block."""

    seconds: float = 0.0
    memory: int = 0

    def __enter__(self) -> Costs:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self.memory = _peak()
        self.seconds = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.seconds
        self.memory = _peak() - self.memory


@dataclass
class Outcome:
    cases: int = 0
    accepted: int = 0
    slowest: float = 0.0
    """CPU seconds of a case."""
    memory: int = 0
    """Bytes that the largest case took beyond those at the start."""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        refused = self.cases - self.accepted - len(self.failures)
        return (
            f"{self.cases} cases: {refused} refused, {self.accepted} accepted, {len(self.failures)} failures; slowest"
            f" {self.slowest:.3f} CPU s, peak memory {self.memory / 2**20:.0f} MiB"
        )


def run(read: Read, cases: range, seed: int) -> Outcome:
    """Each case has random numbers of its own, by which it can be run again alone."""
    outcome = Outcome(cases=len(cases))
    with Costs() as all_:
        for case in cases:
            start = time.process_time()
            try:
                outcome.accepted += read(random.Random(f"{seed}/{case}"))
            except Exception:
                outcome.failures.append(f"--seed {seed} --first {case} --cases 1\n{traceback.format_exc()}")
            outcome.slowest = max(outcome.slowest, time.process_time() - start)
    outcome.memory = all_.memory
    return outcome


def main(read: Read) -> None:
    """Runs the cases that the command line asks for; ends with 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    outcome = run(read, range(given.first, given.first + given.cases), given.seed)
    print(*outcome.failures[:10], outcome, sep="\n")
    raise SystemExit(bool(outcome.failures))


def _peak() -> int:
    """Bytes that have been resident at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
