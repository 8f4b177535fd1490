"""Weights of a network that are quantised while the workers load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quantise.networks import linear_layers
from ..quantise.selection import Selection, select_layers
from ..quantise.settings import FP8, KITCHEN, convrot_group
from ..wire.plain import plain_tensors
from .fp8_linear import become_fp8, quantised
from .packed import QuantisedWeight, Weight


class FP8Weight(Weight):
    """The weight of a linear layer of `fp8_linear`, and its scale. Accepts values of the network's own dtype.

    Args:
        weight: the layer's weight, with the file's values; the layer is converted to the scheme.
        device: computes the scales.
    """

    def __init__(self, weight: Weight, scheme: str, device: torch.device):
        super().__init__(weight.name, weight.module, weight.leaf, weight.dtype)
        assert isinstance(self.module, nn.Linear)
        self._scheme, self._device = scheme, device
        become_fp8(self.module, scheme)
        parameters = (self.module._parameters[name] for name in ("weight", "scale"))
        self.form = [(parameter.shape, parameter.dtype) for parameter in parameters if parameter is not None]

    def stored(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        (stored,) = super().stored(pieces)
        return list(quantised(self._scheme, stored.to(self._device), 1.0 if stored.dtype in FP8 else None))

    def _install(self, pieces: Sequence[Tensor]) -> None:
        for name, piece in zip(("weight", "scale"), pieces, strict=True):
            self.module._parameters[name] = nn.Parameter(piece, requires_grad=False)


class KitchenWeight(QuantisedWeight):
    """The weight of a linear layer that becomes ComfyUI's quantised layer. Accepts values of the network's own dtype.

    Args:
        weight: the layer's weight, with the file's values.
        scheme: one of `quantise.settings.KITCHEN`.
        device: device that the network runs on, and that quantises.
    """

    def __init__(self, weight: Weight, scheme: str, device: torch.device):
        from ..comfyui.quantise import become, quantised  # requires ComfyUI, which the FP8 schemes do not

        form, group = KITCHEN[scheme], convrot_group(weight.shape[1])
        self._device, self._quantised = device, partial(quantised, form=form, group=group)
        dtype = torch.float32 if weight.dtype in FP8 else weight.dtype
        like = self._quantised(torch.empty(weight.shape, dtype=dtype, device="meta"))
        super().__init__(weight.name, weight.module, weight.leaf, like)
        self._plain, self._value = Weight(weight.name, weight.module, weight.leaf, dtype), weight.value
        become(self.module, form, dtype, device)

    def stored(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        (plain,) = self._plain.stored(pieces)
        return plain_tensors(self._quantised(plain.to(self._device)))


def quantise(
    network: nn.Module, plan: Sequence[str], weights: Sequence[Weight], fp8: Mapping[str, Any], device: torch.device
) -> tuple[list[Weight], Selection]:
    """Quantises linear layers of the blocks.

    Args:
        plan: the network's split plan.
        weights: all weights of the network; none is quantised.
        fp8: `scheme` and `skip` of `quantise.settings.FP8Choice`.

    Returns:
        The weights, of which the selected ones are quantised; the selection.

    Raises:
        ConfigError: `skip` has a pattern that matches no layer.
    """
    layers = linear_layers(network, plan, {weight.name: weight.dtype for weight in weights})
    selection = select_layers(layers, scheme=fp8["scheme"], skip=fp8["skip"])
    kind = KitchenWeight if fp8["scheme"] in KITCHEN else FP8Weight
    return [kind(w, fp8["scheme"], device) if w.name in selection.weights else w for w in weights], selection
