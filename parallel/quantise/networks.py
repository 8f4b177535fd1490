"""Lists the linear layers of a network under a split plan, for the selection of those to quantise."""

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
"""Patterns of block layers whose error would affect every token: modulations, input and output of VACE's blocks."""


def linear_layers(network: nn.Module, plan: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> list[LinearLayer]:
    """Lists all linear layers; those outside the blocks, and those that match `_STAY`, are marked as never quantised.

    Args:
        network: network with or without weights, none of them quantised.
        dtypes: maps weights to the dtypes in which they are stored; layers whose weight is missing are left out.
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
