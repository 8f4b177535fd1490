"""Layers that divide their input by its largest value over all tokens, while each rank holds only some tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..split import SequenceRanks

_SCALE, _PRE_SCALE = "input_scale", "pre_quant_scale"
_NVFP4_MAX = torch.finfo(torch.float8_e4m3fn).max * 6.0
"""Product of the largest scale of a block and the largest FP4 value."""


class TokenScales:
    """Sets the input scale of such layers from all ranks' tokens; every rank runs the exchange at the same layers.

    Among ComfyUI's formats only nvfp4 needs this, if it has no calibrated `input_scale` and the device computes in it;
    on other devices the weight is restored. Without a calibrated scale fp8 uses 1, and int8 and mxfp8 use one scale for
    each token or block.

    Args:
        network: the network with its weights.
    """

    def __init__(self, network: nn.Module):
        self.layers = [module for module in network.modules() if _scales_over_tokens(module)]

    @contextmanager
    def over(self, ranks: SequenceRanks) -> Iterator[None]:
        """Within the context, the layers use scales over all tokens of these ranks."""
        with ExitStack() as during:
            for layer in self.layers if ranks.size > 1 else ():
                during.callback(vars(layer).pop, _SCALE, None)
                during.callback(layer.register_forward_pre_hook(partial(_share, ranks)).remove)
            yield


def _scales_over_tokens(module: nn.Module) -> bool:
    return (
        getattr(module, "quant_format", None) == "nvfp4"
        and not getattr(module, "_full_precision_mm", True)
        and getattr(module, _SCALE, None) is None
    )


def _share(ranks: SequenceRanks, layer: nn.Module, args: tuple[Any, ...]) -> None:
    x: Tensor = args[0]
    if (scale := getattr(layer, _PRE_SCALE, None)) is not None:
        x = x * scale.to(x)
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    setattr(layer, _SCALE, ranks.largest(largest) / _NVFP4_MAX)  # in the input's dtype, as ComfyUI divides
