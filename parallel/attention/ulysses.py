"""Ulysses sequence parallelism: attention exchanges tokens for heads (https://arxiv.org/abs/2309.14509).

Two collectives per attention, whatever the shapes: q, k and v travel packed in one all-to-all, the result in another.
Split sizes come from the plan, so no sizes are exchanged and no layer waits for the host. Shapes on rank r, with S_r
local tokens of S, and H_r local heads of H:

    q, k, v [B, S_r, H, D]  →  pack [3, S_r, B·H_j·D] for each rank j  →  all-to-all  →  [3, S, B·H_r·D]
    → kernel on [B, H_r, S, D] →  [S, B, H_r, D]  →  all-to-all  →  [S_r, B, H_j, D] of each rank j  →  [B, S_r, H, D]

In a collective, tokens are the leading dimension in memory, so the senders' pieces arrive in order and the receive
buffer needs no copy: the kernel reads it through strides. Through common memory it is copied once anyway, and q, k and
v are then stored one after the other.

Pipelined, the heads are cut into chunks, each with two collectives of its own: while the kernel works on chunk i, chunk
i + 1 is on its way in and chunk i − 1 on its way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..plan import AttentionPlan, Range, ranges, shares
from .common_memory import CommonMemoryExchange
from .exchange import CollectiveExchange, Exchange, Joined, Pieces
from .traffic import Traffic

T = TypeVar("T")

Local = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Local attention, [B, H, S, D] ×3 → [B, H, S, D]: a kernel or a ring."""


class UlyssesAttention:
    """Attention of one joint sequence over the ranks of `group`.

    Args:
        plan: split of tokens and heads, the same on every rank.
        rank: this process's rank in the plan.
        group: the Ulysses process group, a row of the plan.
        local: attention between the two exchanges.
        pipeline: number of chunks of heads; fewer if a rank has fewer heads.
        traffic: counts the bytes sent and times the exchanges.
        common: exchange that replaces the group's collectives, if the ranks have one; with gradients, with several
            chunks of heads and for messages that do not fit, the group is used nevertheless.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        rank: int,
        group: dist.ProcessGroup,
        local: Local,
        pipeline: int = 1,
        traffic: Traffic | None = None,
        common: CommonMemoryExchange | None = None,
    ):
        row = plan.row(rank)
        self.group = group
        self.local = local
        self.traffic = traffic or Traffic()
        self.heads = plan.heads
        self.position = rank - row.start
        self.tokens = plan.tokens[row]
        pipeline = max(1, min(pipeline, *plan.local_heads[row]))
        # For each chunk, the heads of each rank of the row.
        self.chunks: list[list[Range]] = [[] for _ in range(pipeline)]
        for start, stop in plan.head_ranges[row]:
            for chunk, (first, last) in zip(self.chunks, ranges(shares(stop - start, [1] * pipeline)), strict=True):
                chunk.append((start + first, start + last))
        self._collective = CollectiveExchange(group, self.position)
        self._common = common if pipeline == 1 else None  # it transfers nothing while the kernel runs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes attention of q, k, v, this rank's tokens with all heads, [B, S_r, H, D]. Returns the same shape."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return self._differentiable(q, k, v)
        exchange = self._exchange(q.shape[0] * q.shape[3] * q.element_size())
        batch, tokens, _, dim = q.shape
        coming: Joined | None = self._scatter(exchange, q, k, v, self.chunks[0])
        returning: list[Pieces] = []
        for i, heads in enumerate(self.chunks):
            assert coming is not None
            with self.traffic.waiting():
                coming.wait()
            with self.traffic.copying():
                received = coming.read()
            coming = self._scatter(exchange, q, k, v, self.chunks[i + 1]) if i + 1 < len(self.chunks) else None
            returning.append(self._gather(exchange, self._attend(received, heads, batch, dim), heads))
        out = q.new_empty(tokens, batch, self.heads, dim)
        for heads, pieces in zip(self.chunks, returning, strict=True):
            with self.traffic.waiting():
                pieces.wait()
            with self.traffic.copying():
                for piece, (first, last) in zip(pieces.read(), heads, strict=True):
                    out[:, :, first:last] = piece.view(tokens, batch, last - first, dim)
        return out.transpose(0, 1)

    def _exchange(self, nbytes: int) -> Exchange:
        """Selects the exchange, the same on every rank; `nbytes` is the size of one head of one token, times batch."""
        largest = 3 * max(self.tokens) * self.heads * nbytes
        return self._common if self._common is not None and self._common.fits(largest) else self._collective

    def _scatter(self, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor, heads: list[Range]) -> Joined:
        """Starts the exchange of q, k and v: [B, S_r, H, D] ×3 → [3, S, B · H_r · D]."""
        batch, tokens, _, dim = q.shape
        widths = [batch * (last - first) * dim for first, last in heads]
        with self.traffic.copying():
            parcel = exchange.pack(widths, self.tokens, q)
            for i, x in enumerate((q, k, v)):
                for piece, (first, last) in zip(parcel.pieces, heads, strict=True):
                    piece[i].view(tokens, batch, last - first, dim).copy_(x[:, :, first:last].transpose(0, 1))
        self.traffic.add(3 * tokens * (sum(widths) - widths[self.position]) * q.element_size())
        return parcel.send()

    def _gather(self, exchange: Exchange, out: Tensor, heads: list[Range]) -> Pieces:
        """Starts the exchange of the result: [B, H_r, S, D] → [S_r, B, H_j, D] of each rank j, flat."""
        batch, local, _, dim = out.shape
        tokens = self.tokens[self.position]
        sent = [n * batch * local * dim for n in self.tokens]
        self.traffic.add((out.numel() - sent[self.position]) * out.element_size())
        received = [tokens * batch * (last - first) * dim for first, last in heads]
        with self.traffic.copying():
            # SDPA returns [B, S, H, D] memory seen as [B, H, S, D], so for B = 1 this is contiguous.
            return exchange.start(out.permute(2, 0, 1, 3), sent, received)

    def _attend(self, received: Tensor, heads: list[Range], batch: int, dim: int) -> Tensor:
        """Computes the local attention: [3, S, B · H_r · D] → [B, H_r, S, D]."""
        first, last = heads[self.position]
        q, k, v = received.view(3, sum(self.tokens), batch, last - first, dim).permute(0, 2, 3, 1, 4)
        return self.local(q, k, v) if last > first else q.contiguous()

    def _differentiable(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Runs the same attention with exchanges through autograd, in one chunk."""
        batch, tokens, _, dim = q.shape
        heads = [(first[0], last[1]) for first, last in zip(self.chunks[0], self.chunks[-1], strict=True)]
        packed = torch.stack((q, k, v)).permute(2, 0, 1, 3, 4)  # [S_r, 3, B, H, D]
        pieces = [packed[:, :, :, first:last].flatten() for first, last in heads]
        mine = heads[self.position][1] - heads[self.position][0]
        received = all_to_all(
            torch.cat(pieces),
            [piece.numel() for piece in pieces],
            [n * batch * 3 * mine * dim for n in self.tokens],
            self.group,
        )
        received = received.view(sum(self.tokens), 3, batch * mine * dim).transpose(0, 1)
        out = self._attend(received, heads, batch, dim).permute(2, 0, 1, 3).flatten()
        back = [tokens * batch * (last - first) * dim for first, last in heads]
        returned = all_to_all(out, [n * batch * mine * dim for n in self.tokens], back, self.group)
        shaped = [
            piece.view(tokens, batch, last - first, dim)
            for piece, (first, last) in zip(returned.split(back), heads, strict=True)
        ]
        return torch.cat(shaped, dim=2).transpose(0, 1)


class _AllToAll(torch.autograd.Function):
    """A flat all-to-all; its gradient travels the opposite way."""

    @staticmethod
    def forward(ctx: Any, send: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes = (sent, received, group)
        out = send.new_empty(sum(received))
        dist.all_to_all_single(out, send.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.sizes
        out = grad.new_empty(sum(sent))
        dist.all_to_all_single(out, grad.contiguous(), sent, received, group=group)
        return out, None, None, None


def all_to_all(send: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Runs a flat all-to-all, with gradients.

    Args:
        send: pieces for all ranks, concatenated.
        sent: number of elements for each rank.
        received: number of elements from each rank.
    """
    return _AllToAll.apply(send, sent, received, group)
