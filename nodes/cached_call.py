"""What one call of the network tells the workers of the sampling that it is part of: its cache, its compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parallel.host.cached_sampling import CachedSampling
from ..parallel.host.compiled_sampling import CompiledSampling

SAMPLING = "sequence_parallel_cached_sampling"
"""Key of `transformer_options` during a sampling with a cache."""
COMPILED = "sequence_parallel_compiled_sampling"
"""The same, with compiled blocks."""


def cached_sampling(options: Mapping[str, Any]) -> tuple[CachedSampling | None, float]:
    """The sampling that a call of the network is part of, if that has a cache, and the call's sigma.

    Args:
        options: `transformer_options`.
    """
    sampling, sigmas = options.get(SAMPLING), options.get("sigmas")
    return (None, 0.0) if sampling is None or sigmas is None else (sampling, float(sigmas[0]))


def compiled_sampling(options: Mapping[str, Any]) -> CompiledSampling | None:
    """The sampling that a call of the network is part of, if its blocks are to be compiled."""
    return options.get(COMPILED)


def label(options: Mapping[str, Any]) -> str:
    """Names the conditions that a call of the network computes, and the frames where it sees a window of them only."""
    conditions = options.get("uuids") or options.get("cond_or_uncond") or []
    frames = getattr(options.get("context_window"), "index_list", [])
    return " ".join(map(str, [*conditions, *frames]))
