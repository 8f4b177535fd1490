"""Caches between the blocks of ComfyUI's own networks, at the host: what is refused, what the workers are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cache.settings import CacheSettings, Shapes
from ..errors import UnsupportedError
from ..plans.comfyui import CHAINS
from ..plans.published import known_as
from .cached_sampling import CachedSampling


def check_cache(settings: CacheSettings, network: str, config: Mapping[str, Any]) -> None:
    """Refuses a cache that cannot skip blocks of a network.

    Args:
        network: ComfyUI's class.
        config: what its detection has found.

    Raises:
        UnsupportedError: its plan does not say which blocks may be skipped, or TeaCache has no polynomial for it.
    """
    if network not in CHAINS:
        raise UnsupportedError(
            f"{settings.name} cannot skip blocks of {network}: its split plan does not say which; it can for"
            f" {', '.join(CHAINS)}. Use EasyCache"
        )
    settings.rule(*known_as(network, config))


def cache_message(
    cache: CachedSampling, sigma: float, network: str, config: Mapping[str, Any], shapes: Shapes
) -> dict[str, Any]:
    """What the workers are told with a step, see `CachedSampling.message`.

    Args:
        network, config: as for `check_cache`.
        shapes: of the call's tensors.

    Raises:
        UnsupportedError: see `check_cache`.
    """
    check_cache(cache.settings, network, config)
    return cache.message(sigma, *known_as(network, config), shapes)
