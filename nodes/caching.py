"""Shared code of both cache nodes: attaches their settings to a MODEL and follows each sampling that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..parallel.cache.settings import CacheSettings
from ..parallel.comfyui import contract
from ..parallel.errors import UnsupportedError
from ..parallel.host.cached_sampling import CachedSampling, check_cache
from .cached_call import SAMPLING
from .node_text import tell
from .refusals import refuse_loader
from .shell_patcher import SequenceParallelPatcher

_ATTACHED = "sequence_parallel_cache"
_NATIVE = "easycache"
"""Key of ComfyUI's EasyCache and LazyCache; it and `_ATTACHED` are keys of `transformer_options`."""


@dataclass(frozen=True, slots=True)
class _Attached:
    """Settings that a node has attached to a MODEL."""

    settings: CacheSettings
    node_id: str
    """Id of the node that shows the result."""


def with_cache(model: Any, settings: CacheSettings, node_id: str) -> SequenceParallelPatcher:
    """Returns a clone of the MODEL whose samplings skip blocks.

    Raises:
        UnsupportedError: the MODEL is from another loader, has a cache already, or is of a class whose blocks this
            cache cannot skip.
    """
    contract.require("caches")
    if not isinstance(model, SequenceParallelPatcher):
        raise refuse_loader(settings.name, model, "Use EasyCache for it")
    options = model.model_options.get("transformer_options", {})
    if (other := options.get(_ATTACHED)) is not None:
        raise _stacked(settings.name, other.settings.name)
    if (native := options.get(_NATIVE)) is not None:
        raise _stacked(settings.name, native.name)
    check_cache(settings, model.remote.recipe)
    cached = model.clone()
    cached.model_options.setdefault("transformer_options", {})[_ATTACHED] = _Attached(settings, node_id)
    cached.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _ATTACHED, _sample)
    return cached


def _sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps OUTER_SAMPLE: starts each sampling with an empty cache and ends it with a report."""
    guider = executor.class_obj
    original = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(original)
    transformer_options = options["transformer_options"]
    attached: _Attached = transformer_options[_ATTACHED]
    if (native := transformer_options.get(_NATIVE)) is not None:
        raise _stacked(native.name, attached.settings.name)
    remote = guider.model_patcher.remote
    to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
    sampling = transformer_options[SAMPLING] = CachedSampling(
        attached.settings,
        first_sigma=float(to_sigma(attached.settings.start_percent)),
        last_sigma=float(to_sigma(attached.settings.end_percent)),
    )
    guider.model_options = options
    try:
        result = executor(*args, **kwargs)
    finally:
        guider.model_options = original
        remote.forget(sampling)
    tell(attached.node_id, str(sampling.report))
    return result


def _stacked(second: str, first: str) -> UnsupportedError:
    return UnsupportedError(
        f"{second} cannot be used together with {first}: each would look only at the steps that the other has not"
        " skipped; remove one of the two nodes"
    )
