"""Caches between a network's blocks, at the host: what is refused, what the workers are told."""

from __future__ import annotations

from ..cache.settings import CacheSettings, Shapes
from ..errors import UnsupportedError
from ..plans.libraries import CHAINS
from ..plans.published import known_as
from ..wire.messages import CacheRule
from .cached_sampling import CachedSampling
from .recipe import Recipe


def check_cache(settings: CacheSettings, recipe: Recipe) -> None:
    """Refuses a cache that cannot skip blocks of a network.

    Raises:
        UnsupportedError: its plan does not say which blocks may be skipped, or TeaCache has no polynomial for it.
    """
    chains = CHAINS[recipe.library]
    if recipe.network not in chains:
        raise UnsupportedError(
            f"{settings.name} cannot skip blocks of {recipe.network}: its split plan does not say which; it can for"
            f" {', '.join(chains)}. Use EasyCache"
        )
    settings.rule(*known_as(recipe.network, recipe.arguments))


def cache_message(cache: CachedSampling, sigma: float, recipe: Recipe, shapes: Shapes) -> CacheRule:
    """What the workers are told with a step, see `CachedSampling.message`.

    Args:
        shapes: of the call's tensors.

    Raises:
        UnsupportedError: see `check_cache`.
    """
    check_cache(cache.settings, recipe)
    return cache.message(sigma, *known_as(recipe.network, recipe.arguments), shapes)
