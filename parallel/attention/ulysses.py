"""Ulysses sequence parallelism: attention exchanges tokens for heads (https://arxiv.org/abs/2309.14509).

Two collectives per attention, whatever the shapes: q, k and v travel packed in one all-to-all, the result in another.
Split sizes come from the plan, so no sizes are exchanged and no layer waits for the host. Shapes on rank r, with S_r
local tokens of S, and H_r local heads of H:

    q, k, v [B, S_r, H, D]  →  pack [S_r, B, 3, H_j, D] for each rank j  →  all-to-all  →  [S, B, 3, H_r, D]
    → kernel on [B, H_r, S, D] →  [S, B, H_r, D]  →  all-to-all  →  [S_r, B, H_j, D] of each rank j  →  [B, S_r, H, D]

Tokens lead the layout, so the pieces of the senders land in order and the received buffer needs no copy: the kernel
reads it through strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan import SequencePlan
from .kernels import Kernel


class UlyssesAttention:
    """Attention of one joint sequence over the ranks of `group`.

    Args:
        plan: the split, the same on every rank.
        rank: this process's rank within `group`.
        group: the sequence-parallel process group.
        kernel: local attention, [B, H, S, D] each.
    """

    def __init__(self, plan: SequencePlan, rank: int, group: dist.ProcessGroup, kernel: Kernel):
        self.plan = plan
        self.rank = rank
        self.group = group
        self.kernel = kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: this rank's tokens with all heads, [B, S_r, H, D]. Returns the same shape."""
        q, k, v = self._tokens_to_heads(q, k, v)
        out = self.kernel(q, k, v) if q.shape[1] else torch.empty_like(q, memory_format=torch.contiguous_format)
        return self._heads_to_tokens(out)

    def _tokens_to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S_r, H, D] ×3 → [B, H_r, S, D] ×3 (strided views of one buffer)."""
        batch, tokens, _, dim = q.shape
        plan, per_head = self.plan, batch * 3 * dim
        send = q.new_empty(tokens * plan.heads * per_head)
        sent = [tokens * heads * per_head for heads in plan.local_heads]
        for piece, (first, last) in zip(send.split(sent), plan.head_ranges, strict=True):
            packed = piece.view(tokens, batch, 3, last - first, dim)
            for i, x in enumerate((q, k, v)):
                packed[:, :, i] = x[:, :, first:last].transpose(0, 1)
        heads = plan.local_heads[self.rank]
        received = _all_to_all(send, sent, [n * heads * per_head for n in plan.tokens], self.group)
        q, k, v = received.view(sum(plan.tokens), batch, 3, heads, dim).permute(2, 1, 3, 0, 4)
        return q, k, v

    def _heads_to_tokens(self, out: Tensor) -> Tensor:
        """[B, H_r, S, D] → [B, S_r, H, D]."""
        batch, heads, _, dim = out.shape
        plan, tokens = self.plan, self.plan.tokens[self.rank]
        # SDPA returns [B, S, H, D] memory seen as [B, H, S, D], so for B = 1 this reshape is free.
        send = out.permute(2, 0, 1, 3).reshape(-1)
        received = _all_to_all(
            send,
            [n * batch * heads * dim for n in plan.tokens],
            [tokens * batch * n * dim for n in plan.local_heads],
            self.group,
        )
        pieces = received.split([tokens * batch * n * dim for n in plan.local_heads])
        shaped = [p.view(tokens, batch, n, dim) for p, n in zip(pieces, plan.local_heads, strict=True)]
        return torch.cat(shaped, dim=2).transpose(0, 1)


def _all_to_all(send: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Flat all-to-all with the given element counts per rank."""
    out = send.new_empty(sum(received))
    dist.all_to_all_single(out, send, list(received), list(sent), group=group)
    return out
