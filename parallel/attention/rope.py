"""Rotary position embedding (https://arxiv.org/abs/2104.09864) over several axes, for a part of the tokens.

Pairs are interleaved: (x0, x1), (x2, x3), … as ComfyUI and diffusers lay them out for HunyuanVideo, FLUX and Wan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, [S, D/2] each, or [S, H, D/2] where each head has angles of its own."""


def rope(positions: Sequence[Tensor], dims: Sequence[int], theta: float) -> Rope:
    """Angles for tokens at `positions`, one [S] tensor per axis; axis i takes `dims[i]` of the head's channels.

    Computed in fp64, as ComfyUI does.
    """
    angles = []
    for position, dim in zip(positions, dims, strict=True):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
        angles.append(position.double()[:, None] / theta**exponent)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, table: Rope) -> Tensor:
    """Rotates x [B, S, H, D] by the angles of its tokens; arithmetic in fp32."""
    cos, sin = (part if part.ndim == 3 else part[:, None] for part in table)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)
