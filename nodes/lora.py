"""LoRAs and other weight patches: ComfyUI's own mathematics on one weight at a time, the result for the workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import nn

from ..parallel.checkpoints.source import Stored
from .proxy import add_parameters
from .refusals import refuse


def refuse_patches(patches: Mapping[Any, Any]) -> None:
    """Refuses what `add_patches` is given when it is no LoRA.

    Raises:
        UnsupportedError: another model's weights.
    """
    if any(isinstance(patch, list) for patch in patches.values()):
        raise refuse("merging models (e.g. ModelMergeSimple)")


def patched_weight(patches: Mapping[str, Any], key: str, weight: Stored, device: torch.device) -> Stored:
    """The weight under its patches, to the bit as ComfyUI computes it: on its device, rounded in its way.

    Args:
        patches: `ModelPatcher.patches`.
        key: the weight's name there, which also seeds the rounding to fp8.
        weight: in the storage dtype, or fp8 with its scale; not changed.
        device: where ComfyUI would load the model.

    Returns:
        The weight in the same dtype; of scaled fp8, with a scale that fits the patched values.

    Raises:
        UnsupportedError: a patch gives the weight another shape.
    """
    holder = nn.Module()
    add_parameters(holder, {key: weight.tensor})
    if weight.scale is not None:
        layer, _, _ = key.rpartition(".")
        parent, _, name = layer.rpartition(".")
        setattr(holder.get_submodule(parent), name, _scaled_layer(weight))
    single = comfy.model_patcher.ModelPatcher(holder, device, torch.device("cpu"), size=1)
    single.patches = {key: patches[key]}
    single.patch_weight_to_device(key, device_to=device)
    shape = comfy.utils.get_attr(holder, key).shape
    if shape != weight.tensor.shape:
        raise refuse(
            f"a LoRA that gives {key} the shape {list(shape)} instead of {list(weight.tensor.shape)}"
            " (as control LoRAs do)"
        )
    patched = holder.state_dict()
    return Stored(patched[key], None if weight.scale is None else patched[f"{key}_scale"].item())


def _scaled_layer(weight: Stored) -> nn.Module:
    """ComfyUI's own layer for scaled fp8, which knows how to patch itself. It reads every layout as this one."""
    rows, columns = weight.tensor.shape
    layer: nn.Module = comfy.ops.mixed_precision_ops().Linear(columns, rows, bias=False)
    described = json.dumps({"format": str(weight.tensor.dtype).removeprefix("torch.")})
    layer.load_state_dict(
        {
            "weight": weight.tensor,
            "weight_scale": torch.tensor(weight.scale),
            "comfy_quant": torch.tensor(list(described.encode()), dtype=torch.uint8),
        }
    )
    return layer
