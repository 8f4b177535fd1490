"""Decides whether a network's blocks run, or whether the residual that they added at an earlier step is reused.

A *pass* is one run through the blocks: of cond, of uncond, or of both in one batch. Each pass has a state of its own,
and its decision is the same on all ranks that share its sequence: each rank's tokens change by a different amount, so
the amounts are summed over these ranks before they are compared. Everything that decides whether this sum takes place
is known to all these ranks alike; otherwise a rank would wait for peers that have moved on.
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
"""Tensors that a cache compares or adds: [B, …] for each stream of the latent's tokens (e.g. video and audio)."""
Total = Callable[[Tensor], None]
"""Sums a tensor, in place, over the ranks that share the sequence."""
Mark = float | torch.cuda.Event
"""Point in the order of a device's work: seconds on a CPU, an event on CUDA."""


@dataclass(slots=True)
class Tally:
    """Counters of one step on one rank."""

    passes: int = 0
    hits: int = 0
    """Passes whose blocks were skipped."""
    skipped_s: float = 0.0
    """Seconds that the skipped blocks took when they were computed."""

    def add(self, other: Tally) -> None:
        """Adds the counters of another step."""
        self.passes += other.passes
        self.hits += other.hits
        self.skipped_s += other.skipped_s


@dataclass(slots=True)
class _Remembered:
    """State of one pass."""

    inputs: Hashable
    """Sizes and split; the state is valid only while they are the same."""
    compared: Tensors
    change: Tensors
    """Residual that the blocks that may be skipped have added, [B, S_r, hidden]."""
    timings: list[tuple[Mark, Mark]]
    """Start and end of these blocks, for each time that they were computed."""
    in_a_row: int = 0
    """Number of hits since the blocks were last computed."""
    distances: list[float] = field(default_factory=list)
    """Estimated change of each sample's output since the blocks were last computed; with several streams, all samples
    of the first stream, then those of the next."""


class BlockCache(ABC):
    """Cache of one sampling on one rank.

    Attributes:
        after_first: True if the first block always runs and its residual decides about the other blocks; False if an
            input of the first block decides about all blocks.

    Args:
        threshold: relative change below which blocks are skipped. Each sample of a pass is compared separately, and the
            pass skips only if all samples are below it.
        device: this rank's device.
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
        """Prepares for a step; to be called on all ranks before each step.

        If the degrees have changed, all state is dropped: other ranks then share a sequence, and only some of them may
        remember a pass.

        Args:
            active: True if this step may skip blocks and remembers its passes; otherwise these are only counted.
        """
        if degrees != self._degrees:
            self._remembered.clear()
            self._degrees = degrees
        self._active = active
        self.tally = Tally()

    def enter(self, key: Hashable, inputs: Hashable, total: Total) -> Pass | None:
        """Begins a pass; returns None if this step may not skip blocks: its passes are only counted.

        Args:
            key: identifies the pass within a step.
            inputs: see `_Remembered.inputs`.
        """
        self.tally.passes += 1
        return Pass(self, key, inputs, total) if self._active else None

    @abstractmethod
    def _may_skip(self, known: _Remembered, compared: Tensors, total: Total) -> bool:
        """Returns True if the blocks may be skipped; the same answer on all ranks that share the sequence."""


class Pass:
    """One run through a network's blocks that may skip them; created by `BlockCache.enter`."""

    def __init__(self, cache: BlockCache, key: Hashable, inputs: Hashable, total: Total):
        self._cache, self._key, self._inputs, self._total = cache, key, inputs, total
        self.after_first = cache.after_first
        self._compared: Tensors = ()
        self._timings: list[tuple[Mark, Mark]] = []
        self._began: Mark = 0.0

    def change(self, compared: Tensors) -> Tensors | None:
        """Returns the residual to add in place of the blocks that may be skipped, or None if they must be computed.

        All ranks that share the sequence call it and get the same answer.

        Args:
            compared: residual of the first block, or the modulated input, for the tokens that this rank owns.
        """
        cache = self._cache
        known = cache._remembered.get(self._key)
        if known is not None and known.inputs != self._inputs:
            known = None
        if known is not None and cache._may_skip(known, compared, self._total):
            cache.tally.hits += 1
            # The fastest run: the first one may have included compilation.
            cache.tally.skipped_s += min(seconds_between(*timing) for timing in known.timings)
            return known.change
        self._timings = known.timings if known is not None else []
        cache._remembered.pop(self._key, None)
        known = None  # frees its tensors before the blocks need memory
        self._compared, self._began = compared, mark(cache._device)
        return None

    def computed(self, change: Tensors) -> None:
        """Stores the residual of the computed blocks for later steps."""
        self._timings.append((self._began, mark(self._cache._device)))
        self._cache._remembered[self._key] = _Remembered(self._inputs, self._compared, change, self._timings)


class FirstBlockCache(BlockCache):
    """Cache that compares the first block's residual with the one of the last computed step
    (https://github.com/chengzeyi/ParaAttention, First Block Cache).

    Args:
        most_in_a_row: number of consecutive hits after which a pass is computed regardless of the change; 0 means no
            limit.
    """

    after_first: ClassVar[bool] = True

    def __init__(self, threshold: float, device: torch.device, *, most_in_a_row: int):
        super().__init__(threshold, device)
        self._most_in_a_row = most_in_a_row or inf

    def _may_skip(self, known: _Remembered, compared: Tensors, total: Total) -> bool:
        if known.in_a_row >= self._most_in_a_row:
            return False
        known.in_a_row += 1  # has no effect after a miss, which replaces `known`
        return all(change < self._threshold for change in relative_changes(compared, known.compared, total))


class TeaCache(BlockCache):
    """Cache that estimates how far the output has changed since the last computed step: the sum of a polynomial of the
    modulated input's change from each step to the next (https://arxiv.org/abs/2411.19108, equations 4 to 7).

    Args:
        coefficients: coefficients of the polynomial, highest degree first.
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
        """Returns the polynomial of `change`, at least 0: some are negative outside the range of their fit."""
        result = 0.0
        for coefficient in self._coefficients:
            result = result * change + coefficient
        return max(result, 0.0)


class StepPasses:
    """Passes of one request in one step, in the order of execution.

    Args:
        cache: cache that decides about them.
        request: identifies the request and its samples.
        shape: shape of the latent.
    """

    def __init__(self, cache: BlockCache, request: Hashable, shape: tuple[int, ...], total: Total):
        self._cache, self._request, self._shape, self._total = cache, request, shape, total
        self._count = 0

    def enter(self, split: Hashable) -> Pass | None:
        """Begins the next pass, see `BlockCache.enter`.

        Args:
            split: assignment of tokens to ranks, and other sizes; the same on all ranks that share the sequence.
        """
        key, self._count = (self._request, self._count), self._count + 1
        return self._cache.enter(key, (self._shape, split), self._total)


def block_cache(rule: Mapping[str, Any], device: torch.device) -> BlockCache:
    """Creates the cache that `settings.CacheSettings.rule` describes."""
    kinds: dict[str, type[BlockCache]] = {"first_block": FirstBlockCache, "teacache": TeaCache}
    arguments = dict(rule)
    return kinds[arguments.pop("kind")](arguments.pop("threshold"), device, **arguments)


def relative_changes(new: Tensors, old: Tensors, total: Total) -> list[float]:
    """Returns Σ|new − old| / Σ|old| for each sample [B, …] of each stream, over the tokens of all ranks, by one sum of
    [2, ΣB] numbers over the ranks.

    The change is infinite if Σ|old| is 0.
    """
    parts = ([(a - b).abs_() for a, b in zip(new, old, strict=True)], [b.abs() for b in old])
    sums = torch.stack([torch.cat([x.flatten(1).sum(1, dtype=torch.float32) for x in part]) for part in parts])
    total(sums)
    changes, sizes = sums.tolist()
    return [change / size if size else inf for change, size in zip(changes, sizes, strict=True)]


def mark(device: torch.device) -> Mark:
    """Returns the current point in the device's work, without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Returns the seconds between two marks; only after the device has passed both."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float), "two marks of one device"
    return end - start
