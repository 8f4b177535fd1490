"""Attention of the tokens of some streams to those of the same or other streams, over the ranks that share a sequence.

The usual case (the queries' tokens are the keys' tokens, heads are not grouped, no mask) is computed by
`joint_attention`: one packed all-to-all in, pipelined, through common memory where the ranks have it. Queries of one
stream with keys of another, grouped heads (https://arxiv.org/abs/2305.13245) and masks are packed differently, still in
two collectives. Shapes on rank r, with H heads in G groups of key heads:

    q [B, H, Q_r, D], k, v [B, G, K_r, D]  →  all-to-all  →  q [B, H_r, Q, D], k, v [B, G_r, K, D]
    → local attention  →  [B, H_r, Q, D]  →  all-to-all  →  [B, H, Q_r, D]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan import AttentionPlan
from .common_memory import CommonMemoryExchange
from .joint import JointAttention, joint_attention
from .kernels import Kernel
from .ring import RingAttention
from .row_check import RowCheck
from .traffic import Traffic
from .ulysses import all_to_all


class Compute(Protocol):
    """Local attention, without an exchange."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes attention: q [B, H, Q, D], k and v [B, G, K, D] → [B, H, Q, D]."""


class StreamAttention:
    """Attention distributed over ranks by one plan.

    Args:
        plan: assignment of tokens and heads to ranks.
        rank: this process's rank in the plan.
        ulysses: process group of the rank's row, if the row has several ranks.
        ring: process group of the rank's column, if the column has several ranks.
        kernel: kernel that a ring computes with.
        pipeline: number of chunks of heads.
        traffic: counts the bytes sent.
        common: common memory of the row's ranks, see `UlyssesAttention`.
        launched: counts a ring's exchanges, see `RingAttention`.
        check: compares the first call of a kind with exact attention.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        rank: int,
        ulysses: dist.ProcessGroup | None,
        ring: dist.ProcessGroup | None,
        kernel: Kernel,
        *,
        pipeline: int = 1,
        traffic: Traffic | None = None,
        common: CommonMemoryExchange | None = None,
        launched: Counter[str] | None = None,
        check: RowCheck | None = None,
    ):
        self.plan = plan
        self._rank, self._ulysses, self._ring = rank, ulysses, ring
        self._kernel, self._pipeline, self._common = kernel, pipeline, common
        self._traffic = traffic or Traffic()
        self._launched, self._check = launched, check
        self._row = row = plan.row(rank)
        self._position = rank - row.start
        self._queries, self._keys = plan.tokens[row], plan.keys[row]
        self._heads, self._groups = plan.local_heads[row], plan.local_groups[row]
        self._compute: Compute | None = None
        self._joint: JointAttention | None = None
        if plan.joint:
            local = None if plan.ring_degree > 1 else self._computed
            self._joint = joint_attention(
                plan, rank, ulysses, ring, kernel, pipeline, self._traffic, common, launched, compute=local
            )
        self._around: RingAttention | None = None
        if plan.ring_degree > 1:
            assert ring is not None
            self._around = RingAttention(
                plan.key_chunks, rank // plan.ulysses_degree, ring, kernel, self._traffic, launched
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, compute: Compute, mask: Tensor | None = None) -> Tensor:
        """Computes attention of this rank's tokens: q [B, H, Q_r, D], k and v [B, G, K_r, D] → [B, H, Q_r, D].

        Args:
            compute: attention of all tokens for this rank's heads. A ring uses its kernel instead.
            mask: mask of the whole attention, boolean or additive, [.., Q, K] with tokens in the order of the ranks;
                its head dimension has all heads, or one.
        """
        out = self._attend(q, k, v, compute, mask)
        if self._check is not None:
            self._check(self.plan, q, k, v, out, mask)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, compute: Compute, mask: Tensor | None) -> Tensor:
        if self._joint is not None and mask is None and v.shape[3] == q.shape[3]:
            self._compute = compute
            return self._joint(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        if len(self._queries) > 1:
            q, k, v = self._to_heads(q, k, v)
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask.split(self._heads, 1)[self._position]
        out = self._local(q, k, v, compute, mask)
        return self._to_tokens(out) if len(self._queries) > 1 else out

    def _computed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Applies the `compute` argument of the current call."""
        assert self._compute is not None
        return self._compute(q, k, v)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, compute: Compute, mask: Tensor | None) -> Tensor:
        if not q.shape[1]:  # then no rank of this column has heads
            return q.new_empty(*q.shape[:3], v.shape[3])
        if self._around is None:
            return compute(q, k, v, mask) if q.shape[2] else q.new_empty(*q.shape[:3], v.shape[3])
        if repeats := q.shape[1] // k.shape[1] - 1:
            k, v = (x.repeat_interleave(repeats + 1, dim=1) for x in (k, v))
        return self._around(q, k, v, None if mask is None else self._of_row(mask, q.dtype))

    def _of_row(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the mask of this row's queries, additive and finite: all keys of a chunk may be masked for a query,
        and the undefined softmax over them must not enter the sum."""
        if mask.ndim == 3:
            mask = mask[:, None]
        if mask.shape[-2] > 1:
            before = sum(self.plan.tokens[: self._row.start])
            mask = mask.narrow(-2, before, sum(self._queries))
        lowest = torch.finfo(dtype).min / 4
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
        return mask.to(dtype).clamp(min=lowest)

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchanges this rank's tokens with all heads for the row's tokens with this rank's heads."""
        three = [(q, self._heads, self._queries), (k, self._groups, self._keys), (v, self._groups, self._keys)]
        shares = zip(*(x.split(heads, dim=1) for x, heads, _ in three), strict=True)
        sent = [torch.cat([part.reshape(-1) for part in parts]) for parts in shares]
        shapes = [
            [(x.shape[0], heads[self._position], tokens[rank], x.shape[3]) for x, heads, tokens in three]
            for rank in range(len(self._queries))
        ]
        came = self._exchange(sent, [sum(map(prod, each)) for each in shapes])
        split = [part.split([prod(shape) for shape in each]) for part, each in zip(came, shapes, strict=True)]
        with self._traffic.copying():
            q, k, v = (
                torch.cat([parts[i].view(each[i]) for parts, each in zip(split, shapes, strict=True)], dim=2)
                for i in range(3)
            )
        return q, k, v

    def _to_tokens(self, out: Tensor) -> Tensor:
        """Exchanges the row's tokens with this rank's heads for this rank's tokens with all heads."""
        batch, _, _, dim = out.shape
        shapes = [(batch, heads, self._queries[self._position], dim) for heads in self._heads]
        sent = [part.reshape(-1) for part in out.split(self._queries, dim=2)]
        came = self._exchange(sent, [prod(shape) for shape in shapes])
        return torch.cat([part.view(shape) for part, shape in zip(came, shapes, strict=True)], dim=1)

    def _exchange(self, sent: Sequence[Tensor], received: Sequence[int]) -> Sequence[Tensor]:
        """Sends one flat piece to each rank of the row and returns the piece received from each."""
        assert self._ulysses is not None
        sizes = [piece.numel() for piece in sent]
        with self._traffic.copying():
            whole = torch.cat(list(sent))
        self._traffic.add((whole.numel() - sizes[self._position]) * whole.element_size())
        with self._traffic.waiting():
            return all_to_all(whole, sizes, list(received), self._ulysses).split(list(received))
