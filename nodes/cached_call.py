"""Options of a sampling that each of its network calls passes to the workers: its cache, its compiled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parallel.host.cached_sampling import CachedSampling
from ..parallel.host.compiled_sampling import CompiledSampling

SAMPLING = "sequence_parallel_cached_sampling"
"""Key in `transformer_options` during a sampling with a cache."""
COMPILED = "sequence_parallel_compiled_sampling"
"""Key in `transformer_options` during a sampling with compiled blocks."""


def cached_sampling(options: Mapping[str, Any]) -> tuple[CachedSampling | None, float]:
    """Returns the cached sampling that a network call is part of, and the call's sigma; (None, 0.0) without a cache.

    Args:
        options: `transformer_options`.
    """
    sampling, sigmas = options.get(SAMPLING), options.get("sigmas")
    return (None, 0.0) if sampling is None or sigmas is None else (sampling, float(sigmas[0]))


def compiled_sampling(options: Mapping[str, Any]) -> CompiledSampling | None:
    """Returns the sampling that a network call is part of if its blocks are to be compiled, else None."""
    return options.get(COMPILED)


def label(options: Mapping[str, Any]) -> str:
    """Names the conditions that a network call computes, and its frames if it receives only a window of them."""
    conditions = options.get("uuids") or options.get("cond_or_uncond") or []
    frames = getattr(options.get("context_window"), "index_list", [])
    return " ".join(map(str, [*conditions, *frames]))
