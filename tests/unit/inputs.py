"""Inputs of a step of which only names, shapes and dtypes matter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Name → a tensor without data; masks of text are integer, as ComfyUI's text encoders give them."""
    return {
        name: torch.empty(shape, dtype=torch.long if name == "attention_mask" else torch.float32, device="meta")
        for name, shape in shapes.items()
    }
