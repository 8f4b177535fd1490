"""Which of `transformer_options` go to the workers, in one table, and which code there the workers have, too."""

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
"""Those that stay: code that runs around the network in this process, that goes as data, or that has been refused;
names of ComfyUI's own for what it holds; and the memory manager's."""


def travelling(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the network itself reads: numbers, text, tensors, and nests of them. The pack's own options stay.

    Raises:
        NotPlain: an option that the table does not know, and that cannot travel: code of a node, for example.
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
    """Options that are code, and what the workers are told in its place: option → numbers of the blocks to be skipped,
    by ComfyUI's names of their kinds; or the name of an attention function. Code that they cannot run is left out."""
    found = {REPLACED: _skipped(options.get(REPLACED)), OVERRIDE: _attention(options.get(OVERRIDE))}
    return {name: data for name, data in found.items() if data}


def hands_on(function: Any) -> bool:
    """Whether a function in a block's place does nothing but return its arguments, as SkipLayerGuidance's `skip`: it
    has the code of one that does."""
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
    """The registered function that ComfyUI's own override calls: that of `ModelPatcher.set_model_optimized_attention`,
    which its node ModelAttentionBackend uses."""
    setter = getattr(ModelPatcher, "set_model_optimized_attention", None)
    if setter is None or not isinstance(override, FunctionType) or override.__code__ not in setter.__code__.co_consts:
        return ""
    function = inspect.getclosurevars(override).nonlocals["optimized_attention"]
    registered = comfy.ldm.modules.attention.REGISTERED_ATTENTION_FUNCTIONS
    return next((name for name, each in registered.items() if each is function), "")
