"""LoRAs and other weight patches: ComfyUI's own code patches one weight at a time; the workers get the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from .proxy import Part, add_parameters
from .refusals import refuse


def refuse_patches(patches: Mapping[Any, Any]) -> None:
    """Refuses arguments of `add_patches` that are no LoRA.

    Raises:
        UnsupportedError: they are another model's weights, or choose an attention, as LoRAs of newer ComfyUI may.
    """
    if chosen := [key for key, patch in patches.items() if isinstance(patch, tuple) and patch[:1] == ("config",)]:
        raise refuse(f"a LoRA that chooses the attention of {chosen[0]}", "use a LoRA without such a choice")
    if any(isinstance(patch, list) for patch in patches.values()):
        raise refuse("merging models (e.g. ModelMergeSimple)")


def patched_weight(
    patches: Mapping[str, Any],
    key: str,
    weight: Tensor,
    device: torch.device,
    patcher: type[comfy.model_patcher.ModelPatcher] = comfy.model_patcher.ModelPatcher,
) -> Tensor:
    """Applies the patches to the weight, bit for bit like ComfyUI: on the same device, with the same rounding.

    Args:
        patches: `ModelPatcher.patches`.
        key: name of the weight in `patches`, which also seeds the rounding to fp8.
        weight: the weight in the storage dtype; not changed.
        device: device on which ComfyUI would load the model.
        patcher: class that applies the patches, e.g. that of ComfyUI-GGUF.

    Returns:
        The patched weight in the same dtype.

    Raises:
        UnsupportedError: a patch changes the weight's shape.
    """
    holder = nn.Module()
    add_parameters(holder, {key: weight})
    return _patched(holder, patches, key, device, patcher)


def patched_layer(patches: Mapping[str, Any], key: str, layer: nn.Module, device: torch.device) -> Tensor:
    """Applies the patches to the weight of a quantised layer; otherwise like `patched_weight`.

    Args:
        layer: layer of ComfyUI's class, which can patch itself, with the file's values.

    Returns:
        The patched weight in the same quantised format, with scales that fit its values.
    """
    holder = parent = nn.Module()
    *path, name, _ = key.split(".")
    for part in path:
        parent.add_module(part, Part())
        parent = parent.get_submodule(part)
    parent.add_module(name, layer)
    return _patched(holder, patches, key, device)


def _patched(
    holder: nn.Module,
    patches: Mapping[str, Any],
    key: str,
    device: torch.device,
    patcher: type[comfy.model_patcher.ModelPatcher] = comfy.model_patcher.ModelPatcher,
) -> Tensor:
    before = comfy.utils.get_attr(holder, key).shape
    single = patcher(holder, device, torch.device("cpu"), size=1)
    single.patches = {key: patches[key]}
    single.patch_weight_to_device(key, device_to=device)
    weight: Tensor = comfy.utils.get_attr(holder, key).detach()
    if weight.shape != before:
        raise refuse(
            f"a LoRA that gives {key} the shape {list(weight.shape)} instead of {list(before)} (as control LoRAs do)"
        )
    return weight
