"""Decides whether a network's blocks run, or what they added at an earlier step is added again.

A *pass* is one run through the blocks: of cond, of uncond, or of both in one batch. What a pass remembers is kept apart
from every other's, and its decision is the same on all ranks that share its sequence: each rank's tokens change by
another amount, so the amounts are added up over these ranks before anything is compared. All that decides whether they
are added up at all is known to every rank alike; otherwise a rank would wait for peers that have gone on.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..degrees import Degrees

Tensors = tuple[Tensor, ...]
"""What a cache compares, or adds: of each stream of the latent's tokens (e.g. video and audio) a tensor [B, …]."""
Total = Callable[[Tensor], None]
"""Adds a tensor up, in place, over the ranks that share the sequence."""
Mark = float | torch.cuda.Event
"""A moment in the order of a device's work."""


@dataclass(slots=True)
class Tally:
    """Counters of one step on one rank."""

    passes: int = 0
    hits: int = 0
    """Passes whose blocks were skipped."""
    skipped_s: float = 0.0
    """Seconds that the skipped blocks took when they were computed."""

    def add(self, other: Tally) -> None:
        """Counts another step's too."""
        self.passes += other.passes
        self.hits += other.hits
        self.skipped_s += other.skipped_s


@dataclass(slots=True)
class _Remembered:
    """By one pass."""

    inputs: Hashable
    """What must be the same again: sizes and split."""
    compared: Tensors
    change: Tensors
    """What the blocks that may be skipped have added, [B, S_r, hidden]."""
    timings: list[tuple[Mark, Mark]]
    """Of these blocks, whenever they were computed."""
    in_a_row: int = 0
    """Hits since then."""
    distances: list[float] = field(default_factory=list)
    """Of each sample's output since then, estimated; of several streams one after the other."""


class BlockCache(ABC):
    """The memory of one sampling on one rank.

    Attributes:
        after_first: whether the first block always runs, and what it adds decides about the others; else an input of
            the first block decides about all.

    Args:
        threshold: relative change below which blocks are skipped. Each sample of a pass is judged by itself, and the
            pass skips only if all of them may.
        device: this rank's.
    """

    after_first: ClassVar[bool]

    def __init__(self, threshold: float, device: torch.device):
        self._threshold = threshold
        self._device = device
        self._degrees: Degrees | None = None
        self._active = False
        self._remembered: dict[Hashable, _Remembered] = {}
        self.tally = Tally()

    def begin_step(self, degrees: Degrees, active: bool) -> None:
        """To be called on all ranks before each step.

        Under other degrees another set of ranks shares a sequence, of which only some may remember a pass.

        Args:
            active: whether this step may skip blocks, and remembers them; otherwise its passes are only counted.
        """
        if degrees != self._degrees:
            self._remembered.clear()
            self._degrees = degrees
        self._active = active
        self.tally = Tally()

    def enter(self, key: Hashable, inputs: Hashable, total: Total) -> Pass | None:
        """One more pass; None where this step may not skip: its passes are only counted.

        Args:
            key: names the pass among those of a step.
            inputs: see `_Remembered.inputs`.
        """
        self.tally.passes += 1
        return Pass(self, key, inputs, total) if self._active else None

    @abstractmethod
    def _may_skip(self, known: _Remembered, compared: Tensors, total: Total) -> bool:
        """The same answer on all ranks that share the sequence."""


class Pass:
    """One run through a network's blocks that may skip them; made by `BlockCache.enter`."""

    def __init__(self, cache: BlockCache, key: Hashable, inputs: Hashable, total: Total):
        self._cache, self._key, self._inputs, self._total = cache, key, inputs, total
        self.after_first = cache.after_first
        self._compared: Tensors = ()
        self._timings: list[tuple[Mark, Mark]] = []
        self._began: Mark = 0.0

    def change(self, compared: Tensors) -> Tensors | None:
        """What to add in place of the blocks that may be skipped; None where they are to be computed.

        All ranks that share the sequence call, and get the same answer.

        Args:
            compared: what the first block has added, or the modulated input: of tokens that this rank owns.
        """
        cache = self._cache
        known = cache._remembered.get(self._key)
        if known is not None and known.inputs != self._inputs:
            known = None
        if known is not None and cache._may_skip(known, compared, self._total):
            cache.tally.hits += 1
            # The fastest: a first run may have included compilation.
            cache.tally.skipped_s += min(seconds_between(*timing) for timing in known.timings)
            return known.change
        self._timings = known.timings if known is not None else []
        cache._remembered.pop(self._key, None)
        known = None  # its tensors are not to take memory beside the blocks' own
        self._compared, self._began = compared, mark(cache._device)
        return None

    def computed(self, change: Tensors) -> None:
        """Remembers what the blocks have added that could have been skipped."""
        self._timings.append((self._began, mark(self._cache._device)))
        self._cache._remembered[self._key] = _Remembered(self._inputs, self._compared, change, self._timings)


class FirstBlockCache(BlockCache):
    """Compares what the first block adds with what it added at the last computed step
    (https://github.com/chengzeyi/ParaAttention, First Block Cache).

    Args:
        most_in_a_row: hits after which a pass is computed whatever has changed; 0 is no limit.
    """

    after_first: ClassVar[bool] = True

    def __init__(self, threshold: float, device: torch.device, *, most_in_a_row: int):
        super().__init__(threshold, device)
        self._most_in_a_row = most_in_a_row or inf

    def _may_skip(self, known: _Remembered, compared: Tensors, total: Total) -> bool:
        if known.in_a_row >= self._most_in_a_row:
            return False
        known.in_a_row += 1  # of no account in case of a miss: that remembers anew
        return all(change < self._threshold for change in relative_changes(compared, known.compared, total))


class TeaCache(BlockCache):
    """Adds up estimates of how far the output has moved since the last computed step, from the change of the modulated
    input between any two steps (https://arxiv.org/abs/2411.19108, equations 4 to 7).

    Args:
        coefficients: of the polynomial that makes the estimate, highest degree first.
    """

    after_first: ClassVar[bool] = False

    def __init__(self, threshold: float, device: torch.device, *, coefficients: list[float]):
        super().__init__(threshold, device)
        self._coefficients = coefficients

    def _may_skip(self, known: _Remembered, compared: Tensors, total: Total) -> bool:
        estimates = [self._estimate(change) for change in relative_changes(compared, known.compared, total)]
        known.compared = compared
        known.distances = [a + b for a, b in zip(known.distances or [0.0] * len(estimates), estimates, strict=True)]
        return all(distance < self._threshold for distance in known.distances)

    def _estimate(self, change: float) -> float:
        """Outside the range to which they were fitted some polynomials are negative, which no distance is."""
        result = 0.0
        for coefficient in self._coefficients:
            result = result * change + coefficient
        return max(result, 0.0)


class StepPasses:
    """The passes of one request in one step, in the order in which they come.

    Args:
        cache: what they remember.
        request: names the request and its samples.
        shape: of the latent.
    """

    def __init__(self, cache: BlockCache, request: Hashable, shape: tuple[int, ...], total: Total):
        self._cache, self._request, self._shape, self._total = cache, request, shape, total
        self._count = 0

    def enter(self, split: Hashable) -> Pass | None:
        """The next pass, see `BlockCache.enter`.

        Args:
            split: who owns which tokens, and other sizes; alike on all ranks that share the sequence.
        """
        key, self._count = (self._request, self._count), self._count + 1
        return self._cache.enter(key, (self._shape, split), self._total)


def block_cache(rule: Mapping[str, Any], device: torch.device) -> BlockCache:
    """From `settings.CacheSettings.rule`."""
    kinds: dict[str, type[BlockCache]] = {"first_block": FirstBlockCache, "teacache": TeaCache}
    arguments = dict(rule)
    return kinds[arguments.pop("kind")](arguments.pop("threshold"), device, **arguments)


def relative_changes(new: Tensors, old: Tensors, total: Total) -> list[float]:
    """Σ|new − old| / Σ|old| of each sample [B, …] of each stream, over the tokens of all ranks: one sum of [2, ΣB]
    numbers.

    A sample without any size changes infinitely.
    """
    parts = ([(a - b).abs_() for a, b in zip(new, old, strict=True)], [b.abs() for b in old])
    sums = torch.stack([torch.cat([x.flatten(1).sum(1, dtype=torch.float32) for x in part]) for part in parts])
    total(sums)
    changes, sizes = sums.tolist()
    return [change / size if size else inf for change, size in zip(changes, sizes, strict=True)]


def mark(device: torch.device) -> Mark:
    """This moment; waits for nothing."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """To be called when the device has passed both marks."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float), "two marks of one device"
    return end - start
