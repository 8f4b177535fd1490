"""Selection of the `transformer_options` to send to the workers, and detection of code that the workers have, too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import comfy.ldm.modules.attention
from comfy.model_patcher import ModelPatcher

from ..parallel.split.routes import OVERRIDE, REPLACED
from ..parallel.wire.trees import NotPlain, flatten

HERE = (
    "callbacks",
    "context_window",
    "easycache",
    OVERRIDE,
    "patches",
    REPLACED,
    "prefetch_dynamic_vbars",
    "uuids",
    "wrappers",
)
"""Options that stay in this process: code that runs around the network here, is sent as data, or has been refused;
ComfyUI's names of its own objects; and the memory manager's options."""


def travelling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that the network reads: numbers, text, tensors and nests of them, but not the pack's own.

    Raises:
        NotPlain: an option is not in `HERE` and cannot be sent to the workers, e.g. because it is a node's code.
    """
    found = {
        name: value
        for name, value in options.items()
        if name not in HERE and not name.startswith("sequence_parallel") and value is not None
    }
    for name, value in found.items():
        try:
            flatten(value, name, {})
        except NotPlain as error:
            raise NotPlain(f"transformer_options.{error.path}", error.value) from None
    return found | as_data(options)


def as_data(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts options that are code to data for the workers. Leaves out code that the workers cannot run.

    Returns:
        Option → indices of the blocks to skip, by ComfyUI's names of their kinds; or the name of an attention function.
    """
    found = {REPLACED: _skipped(options.get(REPLACED)), OVERRIDE: _attention(options.get(OVERRIDE))}
    return {name: data for name, data in found.items() if data}


def hands_on(function: Any) -> bool:
    """Returns True if a function that replaces a block only returns its arguments, like SkipLayerGuidance's `skip`.

    Compares its bytecode with that of such a function.
    """
    return (
        isinstance(function, FunctionType)
        and function.__code__.co_code == _skip.__code__.co_code
        and function.__code__.co_argcount == _skip.__code__.co_argcount
    )


def _skip(args: Any, extra_args: Any) -> Any:
    return args


def _skipped(replaced: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if not isinstance(replaced, Mapping) or {kind for kind, places in replaced.items() if places} != {"dit"}:
        return {}
    for place, function in replaced["dit"].items():
        if not hands_on(function) or len(place) != 2:
            return {}
        found.setdefault(place[0], []).append(place[1])
    return found


def _attention(override: Any) -> str:
    """Returns the name of the registered function that ComfyUI's own override calls; empty for any other override.

    ComfyUI's own is set by `ModelPatcher.set_model_optimized_attention`, which its node ModelAttentionBackend uses.
    """
    setter = getattr(ModelPatcher, "set_model_optimized_attention", None)
    if setter is None or not isinstance(override, FunctionType) or override.__code__ not in setter.__code__.co_consts:
        return ""
    function = inspect.getclosurevars(override).nonlocals["optimized_attention"]
    registered = comfy.ldm.modules.attention.REGISTERED_ATTENTION_FUNCTIONS
    return next((name for name, each in registered.items() if each is function), "")
