"""Linear layers in comfy-kitchen's formats, made as ComfyUI makes them of a file that is quantised so."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor, nn

from ..quantise.settings import FP8, KITCHEN, convrot_group
from ..wire.plain import plain_tensors
from ..worker.packed import QuantisedWeight, Weight


class KitchenWeight(QuantisedWeight):
    """The weight of a linear layer that becomes ComfyUI's own of the format. Takes values of the network's own dtype.

    Args:
        weight: the layer's, with the file's values.
        scheme: one of `quantise.settings.KITCHEN`.
        device: that the network runs on, which quantises.
    """

    def __init__(self, weight: Weight, scheme: str, device: torch.device):
        self._scheme, self._device = scheme, device
        dtype = torch.float32 if weight.dtype in FP8 else weight.dtype
        form = self._quantised(torch.empty(weight.shape, dtype=dtype, device="meta"))
        super().__init__(weight.name, weight.module, weight.leaf, form)
        self._plain, self._value = Weight(weight.name, weight.module, weight.leaf, dtype), weight.value
        _become(self.module, KITCHEN[scheme], dtype, device)

    def stored(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        (plain,) = self._plain.stored(pieces)
        return plain_tensors(self._quantised(plain.to(self._device)))

    def _quantised(self, weight: Tensor) -> Any:
        options: dict[str, Any] = {}
        if self._scheme == "int8_convrot":
            group = convrot_group(weight.shape[1])
            options = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
        elif self._scheme == "nvfp4":
            options = {"scale": "recalculate"}
        return QuantizedTensor.from_float(weight, QUANT_ALGOS[KITCHEN[self._scheme]]["comfy_tensor_layout"], **options)


@functools.cache
def _operations(dtype: torch.dtype, device: torch.device) -> Any:
    """ComfyUI's for quantised files; made anew at each question, and would be compiled anew."""
    mixed = SimpleNamespace(quant_config={"mixed_ops": True})
    return comfy.ops.pick_operations(None, dtype, load_device=device, model_config=mixed)


def _become(layer: nn.Module, form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a linear layer what ComfyUI's loading makes of one of this format, but for the weight."""
    assert isinstance(layer, nn.Linear)
    operations = _operations(dtype, device)
    made = operations.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    layer.__class__ = operations.Linear
    vars(layer).update((name, value) for name, value in vars(made).items() if name not in vars(layer))
    described: dict[str, Any] = {"quant_format": form, "layout_type": QUANT_ALGOS[form]["comfy_tensor_layout"]}
    vars(layer).update(described, _full_precision_mm=form in operations._disabled)
