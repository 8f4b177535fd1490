"""The linear layers of a network under a split plan, as FP8 sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..split.blocks import planned_blocks
from .selection import LinearLayer, matches
from .settings import FP8

_STAY = (
    "*mod", "mod_[xy]", "mod[CX]*", "*modulation*", "adaln*", "*norm*.linear", "before_proj", "after_proj",
    "to_scale_shift_gate",
)  # fmt: skip
"""Layers of blocks whose error would be in every token: modulations, and the ways into and out of VACE's blocks."""


def linear_layers(network: nn.Module, plan: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> list[LinearLayer]:
    """All linear layers; those outside of the blocks, and the blocks' modulations, stay as they are.

    Args:
        network: with or without weights, none of them quantised.
        dtypes: weight → dtype in which it is kept.
    """
    inside = {module for block in planned_blocks(network, plan) for module in block.modules()}
    found = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight" not in dtypes:
            continue
        dtype = dtypes[f"{name}.weight"]
        stays = module not in inside or any(matches(name, pattern) for pattern in _STAY)
        shape = (module.out_features, module.in_features)
        found.append(LinearLayer(name, shape, dtype.itemsize, is_fp8=dtype in FP8, stays=stays))
    return found
