"""Merging attention over disjoint sets of keys by log-sum-exp (https://arxiv.org/abs/2310.01889, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges `part` into `out`.

    Args:
        out: attention over some keys, [B, H, S, D] in fp32, changed in place.
        lse: its log-sum-exp, [B, H, S] in fp32.
        part, part_lse: attention and log-sum-exp over other keys; `part` in any dtype.

    Returns:
        The merged result and its log-sum-exp. `lse − logsigmoid(lse − part_lse)`, common in ring implementations, is
        equal unless all keys of one operand are masked: next to a log-sum-exp of −1e37 it loses the other operand.
    """
    weight = torch.sigmoid(part_lse - lse)[..., None]
    out.add_(weight * (part.float() - out))
    return out, torch.logaddexp(lse, part_lse)
