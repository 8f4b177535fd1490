"""LoRAs and other weight patches: ComfyUI's own mathematics on one weight at a time, the result for the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from .proxy import add_parameters
from .refusals import refuse


def refuse_patches(patches: Mapping[Any, Any]) -> None:
    """Refuses what `add_patches` is given when it is no LoRA.

    Raises:
        UnsupportedError: another model's weights.
    """
    if any(isinstance(patch, list) for patch in patches.values()):
        raise refuse("merging models (e.g. ModelMergeSimple)")


def patched_weight(patches: Mapping[str, Any], key: str, weight: Tensor, device: torch.device) -> Tensor:
    """The weight under its patches, to the bit as ComfyUI computes it: on its device, rounded in its way.

    Args:
        patches: `ModelPatcher.patches`.
        key: the weight's name there, which also seeds the rounding to fp8.
        weight: in the storage dtype; not changed.
        device: where ComfyUI would load the model.

    Raises:
        UnsupportedError: a patch gives the weight another shape.
    """
    holder = nn.Module()
    add_parameters(holder, {key: weight})
    single = comfy.model_patcher.ModelPatcher(holder, device, torch.device("cpu"), size=1)
    single.patches = {key: patches[key]}
    single.patch_weight_to_device(key, device_to=device)
    patched: Tensor = comfy.utils.get_attr(holder, key)
    if patched.shape != weight.shape:
        raise refuse(
            f"a LoRA that gives {key} the shape {list(patched.shape)} instead of {list(weight.shape)}"
            " (as control LoRAs do)"
        )
    return patched
