"""Merging attention over disjoint sets of keys by log-sum-exp (https://arxiv.org/abs/2310.01889, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Adds `part` to `out`.

    Args:
        out: [B, H, S, D] in fp32, changed in place.
        lse: [B, H, S] in fp32.
        part, part_lse: the same over other keys; `part` in any dtype.

    Returns:
        The merged result and its log-sum-exp. `lse − logsigmoid(lse − part_lse)`, which ring implementations share, is
        the same until keys are masked as a whole: beside a log-sum-exp of −1e37 it loses the other one.
    """
    weight = torch.sigmoid(part_lse - lse)[..., None]
    out.add_(weight * (part.float() - out))
    return out, torch.logaddexp(lse, part_lse)
