"""ComfyUI's parsed command line as plain data, so that a worker's ComfyUI makes the same decisions as the host's."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any


def as_plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Encodes the arguments that are plain data, enumerations, or lists and sets of those.

    Other arguments are left out; no VAE depends on them.
    """
    found = {}
    for name, value in arguments.items():
        try:
            found[name] = _encode(value)
        except TypeError:
            continue
    return found


def restore(arguments: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Decodes the result of `as_plain`.

    Args:
        module: module that defines the classes of the enumerations.
    """
    return {name: _decode(value, module) for name, value in arguments.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, set):
        return {"set": [_encode(item) for item in value]}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    raise TypeError


def _decode(value: Any, module: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, module) for item in value]
    if not isinstance(value, dict):
        return value
    if "enum" in value:
        return getattr(module, value["enum"])(value["value"])
    return {_decode(item, module) for item in value["set"]}
