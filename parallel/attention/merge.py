"""Merging attention over disjoint sets of keys by log-sum-exp (https://arxiv.org/abs/2310.01889, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Adds `part` to `out`.

    Args:
        out: [B, H, S, D] in fp32, changed in place.
        lse: [B, H, S] in fp32.
        part, part_lse: the same over other keys; `part` in any dtype.

    Returns:
        The merged result and its log-sum-exp, in the numerically safe form of
        https://github.com/zhuzilin/ring-flash-attention/pull/34#issuecomment-2076126795
    """
    weight = torch.sigmoid(part_lse - lse)[..., None]
    out.add_(weight * (part.float() - out))
    return out, lse - F.logsigmoid(lse - part_lse)
