"""Linear layers in comfy-kitchen's formats, made as ComfyUI makes them of a file that is quantised so."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor, nn


def quantised(weight: Tensor, form: str, group: int) -> Any:
    """A weight in a format.

    Args:
        weight: [N, K], of any device, the meta device too.
        form: ComfyUI's name.
        group: how many of its columns int8 rotates together.

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
    """Makes a linear layer what ComfyUI's loading makes of one of this format, but for the weight."""
    assert isinstance(layer, nn.Linear)
    operations = _operations(dtype, device)
    made = operations.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    layer.__class__ = operations.Linear
    vars(layer).update((name, value) for name, value in vars(made).items() if name not in vars(layer))
    described: dict[str, Any] = {"quant_format": form, "layout_type": QUANT_ALGOS[form]["comfy_tensor_layout"]}
    vars(layer).update(described, _full_precision_mm=form in operations._disabled)


@functools.cache
def _operations(dtype: torch.dtype, device: torch.device) -> Any:
    """ComfyUI's for quantised files; made anew at each question, and would be compiled anew."""
    mixed = SimpleNamespace(quant_config={"mixed_ops": True})
    return comfy.ops.pick_operations(None, dtype, load_device=device, model_config=mixed)
