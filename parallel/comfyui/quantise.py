"""Linear layers in comfy-kitchen's formats, built as ComfyUI builds them from a file in these formats."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor, nn


def quantised(weight: Tensor, form: str, group: int) -> Any:
    """Quantises a weight.

    Args:
        weight: [N, K], on any device, also meta.
        form: ComfyUI's name of the format.
        group: number of columns that int8 rotates together.

    Returns:
        A tensor of ComfyUI's class.
    """
    options: dict[str, Any] = {}
    if form == "int8_tensorwise":
        options = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
    elif form == "nvfp4":
        options = {"scale": "recalculate"}
    return QuantizedTensor.from_float(weight, QUANT_ALGOS[form]["comfy_tensor_layout"], **options)


def become(layer: nn.Module, form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Turns a linear layer into the one that ComfyUI would load in this format, except for the weight."""
    assert isinstance(layer, nn.Linear)
    operations = _operations(dtype, device)
    made = operations.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    layer.__class__ = operations.Linear
    vars(layer).update((name, value) for name, value in vars(made).items() if name not in vars(layer))
    described: dict[str, Any] = {"quant_format": form, "layout_type": QUANT_ALGOS[form]["comfy_tensor_layout"]}
    vars(layer).update(described, _full_precision_mm=form in operations._disabled)


@functools.cache
def _operations(dtype: torch.dtype, device: torch.device) -> Any:
    """Returns ComfyUI's operations for quantised files. Cached: ComfyUI makes new classes at each call, and each of
    them would be compiled."""
    mixed = SimpleNamespace(quant_config={"mixed_ops": True})
    return comfy.ops.pick_operations(None, dtype, load_device=device, model_config=mixed)
