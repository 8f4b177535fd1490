"""Layers that divide their input by the largest value of all tokens, of which a rank has only some."""

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
"""Of a block's scale times that of a value."""


class TokenScales:
    """Gives such layers the largest value of all ranks' tokens; every rank asks for it at the same layers.

    Of ComfyUI's formats this is nvfp4 without a calibrated `input_scale`, where the device computes in it; elsewhere
    the weight is restored. fp8 then takes 1, int8 and mxfp8 one scale for each token or block.

    Args:
        network: with its weights.
    """

    def __init__(self, network: nn.Module):
        self.layers = [module for module in network.modules() if _scales_over_tokens(module)]

    @contextmanager
    def over(self, ranks: SequenceRanks) -> Iterator[None]:
        """Inside, the scales are those of all tokens of these ranks."""
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
