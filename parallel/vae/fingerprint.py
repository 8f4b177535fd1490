"""Structure of a network as plain data, so that two processes can check that they have built the same network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Fingerprint = dict[str, str]
"""Maps the name of a module or tensor to its description."""

_PATCHERS = {
    "bias_function", "current_weight_patches_uuid", "device", "lowvram_patch_counter", "model_loaded_weight_memory",
    "model_lowvram", "model_offload_buffer_memory", "prev_comfy_cast_weights", "training", "weight_function",
}  # fmt: skip
"""Attributes that ComfyUI's ModelPatcher and torch set on a network: its state, not its settings."""
_PLAIN = (bool, int, float, str, type(None))


def fingerprint(network: nn.Module) -> Fingerprint:
    """Returns the class and settings of each module, and the shape and dtype, but not the values, of each tensor."""
    modules = {name: f"{type(module).__name__}({_settings(module)})" for name, module in network.named_modules()}
    tensors = {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in network.state_dict().items()}
    return modules | tensors


def first_difference(expected: Mapping[str, str], actual: Mapping[str, str]) -> str | None:
    """Describes the first entry that differs; returns None if there is none."""
    for name in [*expected, *(name for name in actual if name not in expected)]:
        if expected.get(name) != actual.get(name):
            here, there = (entries.get(name, "missing") for entries in (actual, expected))
            return f"{name or 'the network'} would be {_shortened(here)}, here it is {_shortened(there)}"
    return None


def _settings(module: nn.Module) -> str:
    """Formats the module's public attributes that are plain data."""
    found = {
        name: value
        for name, value in vars(module).items()
        if _is_plain(value) and not name.startswith(("_", "comfy_")) and name not in _PATCHERS
    }
    return ", ".join(f"{name}={found[name]!r}" for name in sorted(found))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)
