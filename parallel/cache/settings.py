"""Settings of the cache nodes, and the rule that the workers get from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from ..errors import ConfigError
from .coefficients import coefficients

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(kw_only=True, slots=True, frozen=True)
class CacheSettings(ABC):
    """Settings common to both caches."""

    name: ClassVar[str]
    """Name of the node, for messages."""
    start_percent: float = 0.0
    """Fraction of the sampling, 0 to 1, before which every step is computed; 0 caches from the start."""
    end_percent: float = 1.0
    """Fraction of the sampling, 0 to 1, after which every step is computed; 1 caches to the end."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ConfigError(
                f"start_percent is {self.start_percent} and end_percent {self.end_percent};"
                " allowed are 0 to 1, the start not after the end"
            )

    @abstractmethod
    def rule(self, family: str, config: Mapping[str, Any], shapes: Shapes | None = None) -> dict[str, Any]:
        """Returns the arguments of `blocks.block_cache` as plain data.

        Args:
            family, config: see `plans.published`.
            shapes: shapes of a step's inputs; without them the rule may be that of another step.

        Raises:
            UnsupportedError: this cache does not support the model, or this variant of it.
        """


@dataclass(kw_only=True, slots=True, frozen=True)
class FirstBlockCacheSettings(CacheSettings):
    """Settings of the First Block Cache (SP) node."""

    name: ClassVar[str] = "First Block Cache (SP)"
    residual_diff_threshold: float
    """Relative change (L1) of what the first block adds, below which the other blocks are skipped; 0 never skips."""
    max_consecutive_hits: int = 0
    """Number of consecutive steps that may be skipped; 0 means no limit."""

    def __post_init__(self) -> None:
        # `super()` without arguments does not find the class that `slots` makes
        CacheSettings.__post_init__(self)
        _require_threshold("residual_diff_threshold", self.residual_diff_threshold)
        most = self.max_consecutive_hits
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ConfigError(f"max_consecutive_hits is {most!r}; allowed are 0 (no limit), 1 or more steps")

    def rule(self, family: str, config: Mapping[str, Any], shapes: Shapes | None = None) -> dict[str, Any]:
        return {
            "kind": "first_block",
            "threshold": self.residual_diff_threshold,
            "most_in_a_row": self.max_consecutive_hits,
        }


@dataclass(kw_only=True, slots=True, frozen=True)
class TeaCacheSettings(CacheSettings):
    """Settings of the TeaCache (SP) node."""

    name: ClassVar[str] = "TeaCache (SP)"
    rel_l1_thresh: float
    """Estimated relative change (L1) of the output, summed since the last computed step, below which the blocks are
    skipped; 0 never skips."""

    def __post_init__(self) -> None:
        CacheSettings.__post_init__(self)
        _require_threshold("rel_l1_thresh", self.rel_l1_thresh)

    def rule(self, family: str, config: Mapping[str, Any], shapes: Shapes | None = None) -> dict[str, Any]:
        return {
            "kind": "teacache",
            "threshold": self.rel_l1_thresh,
            "coefficients": coefficients(family, config, shapes),
        }


def _require_threshold(knob: str, value: float) -> None:
    if not 0 <= value < inf:
        raise ConfigError(f"{knob} is {value!r}; allowed are 0 (never skips) or more, and finite")
