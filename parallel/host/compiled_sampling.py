"""Host side of a sampling with compiled blocks: settings for the workers, and a report of their compilations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compilation.settings import CompileSettings

_ADDED = ("seconds", "graphs", "breaks", "recompilations")
"""Counters of a rank that are summed over the steps."""


@dataclass(frozen=True, slots=True)
class CompileReport:
    """Summary of the compilations in the workers."""

    name: str
    steps: int
    seconds: float
    """Compilation time of the rank that took longest."""
    graphs: int
    """Largest number of graphs that a rank compiled; `breaks` and `recompilations` are maxima over ranks, too."""
    breaks: int
    recompilations: int
    kinds: int
    """Number of kinds of blocks that are compiled."""
    failures: tuple[tuple[int, str], ...]
    """Ranks whose blocks ran uncompiled, each with the reason."""

    def __str__(self) -> str:
        if self.failures:
            rank, cause = self.failures[0]
            others = f" and {len(self.failures) - 1} more" if len(self.failures) > 1 else ""
            return f"{self.name}: WARNING: not compiled on worker rank {rank}{others}: {cause}"
        if not self.steps:
            return f"{self.name}: no step has run"
        if not self.kinds:
            return f"{self.name}: WARNING: not compiled: the blocks of this network cannot be compiled"
        kinds = f"{_count(self.kinds, 'kind')} of blocks"
        if not self.graphs:
            return f"{self.name}: {kinds}, compiled before"
        return (
            f"{self.name}: {kinds}, {_count(self.graphs, 'graph')} compiled in {self.seconds:.1f} s (slowest worker);"
            f" {_count(self.breaks, 'graph break')}, {_count(self.recompilations, 'recompilation')}"
        )


class CompiledSampling:
    """One sampling with compiled blocks, and its compilation counters, summed over the steps."""

    def __init__(self, settings: CompileSettings):
        self.settings = settings
        self._steps = self._kinds = 0
        self._ranks: dict[int, Counter[str]] = defaultdict(Counter)
        """Maps ranks to their sums of the counters in `_ADDED`."""
        self._failures: dict[int, str] = {}

    def count(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Adds the results of a step, one per rank, to the sums."""
        self._steps += 1
        for rank, result in enumerate(results):
            told = result["compile"]
            self._ranks[rank].update({name: told[name] for name in _ADDED})
            self._kinds = max(self._kinds, told["kinds"])
            if told["failure"]:
                self._failures[rank] = told["failure"]

    @property
    def report(self) -> CompileReport:
        """Summary so far."""
        most = {name: max((of_rank[name] for of_rank in self._ranks.values()), default=0) for name in _ADDED}
        failures = tuple(sorted(self._failures.items()))
        return CompileReport(name=self.settings.name, steps=self._steps, kinds=self._kinds, failures=failures, **most)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
