"""Host side of a sampling with a block cache: which steps may skip blocks, and how much time that has saved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from ..cache.settings import CacheSettings, Shapes
from ..degrees import Degrees
from ..errors import UnsupportedError
from ..plans.libraries import CHAINS
from ..plans.published import known_as
from ..wire.messages import CacheRule
from .recipe import Recipe

_NUMBERS = itertools.count(1)


def check_cache(settings: CacheSettings, recipe: Recipe, shapes: Shapes | None = None) -> dict[str, Any]:
    """Returns the rule by which the workers decide which blocks of a network to skip.

    Raises:
        UnsupportedError: the network's split plan does not say which blocks may be skipped, or TeaCache has no
            polynomial for the network.
    """
    chains = CHAINS[recipe.library]
    if recipe.network not in chains:
        raise UnsupportedError(
            f"{settings.name} cannot skip blocks of {recipe.network}: its split plan does not name the blocks that may"
            f" be skipped. The plans of these classes do: {', '.join(chains)}. Use EasyCache"
        )
    return settings.rule(*known_as(recipe.network, recipe.arguments), shapes)


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Hits, passes and time saved of a block cache."""

    name: str
    hits: int
    """Passes whose blocks were skipped. A pass is one run through the network: of cond, uncond, or both in a batch."""
    passes: int
    seconds: float
    """Duration of all steps, each on its slowest rank."""
    seconds_saved: float
    """Estimated time saved: what the skipped blocks took when computed, on the devices that the others waited for."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        times = (self.seconds + self.seconds_saved) / self.seconds if self.seconds else 1.0
        return (
            f"{self.name}: skipped the blocks in {self.hits} of {self.passes} network passes;"
            f" {self.seconds:.1f} s instead of about {self.seconds + self.seconds_saved:.1f} s ({times:.2f}×)"
        )


class CachedSampling:
    """One sampling with a block cache. Workers cache under its number, which is never reused: the cache starts empty.

    Args:
        settings: settings of the cache.
        first_sigma, last_sigma: a step may skip blocks where `last_sigma` < its sigma ≤ `first_sigma`.
    """

    def __init__(self, settings: CacheSettings, *, first_sigma: float = inf, last_sigma: float = 0.0):
        self.settings = settings
        self.number = next(_NUMBERS)
        self._first_sigma, self._last_sigma = first_sigma, last_sigma
        self._hits = self._passes = 0
        self._seconds = self._saved = 0.0

    def restart(self) -> None:
        """Starts over with an empty cache after a Cancel or a failure, when only some ranks may have cached a step."""
        self.number = next(_NUMBERS)

    def message(self, sigma: float, recipe: Recipe, shapes: Shapes) -> CacheRule:
        """Returns the cache rule to send to the workers with a step.

        Args:
            shapes: shapes of the call's tensors.

        Raises:
            UnsupportedError: see `check_cache`.
        """
        rule = check_cache(self.settings, recipe, shapes)
        return CacheRule(sampling=self.number, rule=rule, active=self.is_active(sigma))

    def is_active(self, sigma: float) -> bool:
        """Returns True if a step at `sigma` may skip blocks."""
        return self._last_sigma < sigma <= self._first_sigma

    def count(self, results: Sequence[Mapping[str, Any]], degrees: Degrees) -> None:
        """Adds the results of a step, one per rank, to the totals."""
        for result in results[:: degrees.sp]:  # the ranks of a sequence count alike
            self._hits += result["cache"]["hits"]
            self._passes += result["cache"]["passes"]
        seconds = max(result["seconds"] for result in results)
        self._seconds += seconds
        self._saved += max(result["seconds"] + result["cache"]["skipped_s"] for result in results) - seconds

    @property
    def report(self) -> CacheReport:
        """Totals so far."""
        return CacheReport(self.settings.name, self._hits, self._passes, self._seconds, self._saved)
