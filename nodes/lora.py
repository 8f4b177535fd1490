"""LoRAs and other weight patches: ComfyUI's own mathematics on one weight at a time, the result for the workers."""

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
    """Refuses what `add_patches` is given when it is no LoRA.

    Raises:
        UnsupportedError: another model's weights, or a choice of attention, which newer ComfyUI's LoRAs may have.
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
    """The weight under its patches, to the bit as ComfyUI computes it: on its device, rounded in its way.

    Args:
        patches: `ModelPatcher.patches`.
        key: the weight's name there, which also seeds the rounding to fp8.
        weight: in the storage dtype; not changed.
        device: where ComfyUI would load the model.
        patcher: whose way it is, e.g. that of ComfyUI-GGUF.

    Returns:
        The weight in the same dtype.

    Raises:
        UnsupportedError: a patch gives the weight another shape.
    """
    holder = nn.Module()
    add_parameters(holder, {key: weight})
    return _patched(holder, patches, key, device, patcher)


def patched_layer(patches: Mapping[str, Any], key: str, layer: nn.Module, device: torch.device) -> Tensor:
    """The same for the weight of a quantised layer.

    Args:
        layer: of ComfyUI's class, which knows how to patch itself, with the file's values.

    Returns:
        The weight, quantised likewise, with scales that fit the patched values.
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
