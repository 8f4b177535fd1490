"""Ring attention: keys and values travel around a ring of ranks (https://arxiv.org/abs/2310.01889).

Rank i holds the queries, keys and values of chunk i. In each of the n − 1 exchanges it computes with the chunk it holds
while it sends that chunk on and receives the next one. K and V travel in one buffer; chunks may be uneven, their sizes
come from the plan. Partial results are merged in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedError
from .kernels import Kernel
from .merge import merge
from .traffic import Traffic


class RingAttention:
    """Attention of this rank's queries to the keys of all ranks of `group`.

    Args:
        chunks: number of keys of each rank of the ring.
        index: this rank's index in the ring.
        group: the ring's process group.
        kernel: must provide log-sum-exp.
        traffic: counts the bytes sent and times the exchanges.
        launched: counts the exchanges that this rank has launched, by the group's name.

    Raises:
        UnsupportedError: the kernel provides no log-sum-exp; raised on all ranks alike, before anything is sent.
    """

    def __init__(
        self,
        chunks: Sequence[int],
        index: int,
        group: dist.ProcessGroup,
        kernel: Kernel,
        traffic: Traffic | None = None,
        launched: Counter[str] | None = None,
    ):
        if kernel.no_lse:
            raise UnsupportedError(kernel.no_lse)
        self.chunks = tuple(chunks)
        self.index = index
        self.group = group
        self.kernel = kernel
        self.traffic = traffic or Traffic()
        self.launched = Counter() if launched is None else launched

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes attention: q [B, H, Q, D], k and v [B, H, S_i, D] → [B, H, Q, D].

        Args:
            mask: additive and finite, for this rank's queries and the keys of all chunks, [.., Q or 1, S].
        """
        return _Ring.apply(q, k, v, self, mask)

    def exchange(self, send: Tensor, receive: Tensor) -> list[dist.Work]:
        """Starts sending `send` to the next rank and receiving `receive` from the previous one."""
        size = len(self.chunks)
        following = dist.get_global_rank(self.group, (self.index + 1) % size)
        previous = dist.get_global_rank(self.group, (self.index - 1) % size)
        self.launched[self.group.group_name] += 1
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, following, self.group),
                dist.P2POp(dist.irecv, receive, previous, self.group),
            ]
        )

    def held_after(self, rounds: int) -> int:
        """Returns the index of the chunk that this rank holds after `rounds` rounds."""
        return (self.index - rounds) % len(self.chunks)

    def size_after(self, rounds: int) -> int:
        """Returns the number of keys in the chunk that this rank holds after `rounds` rounds."""
        return self.chunks[self.held_after(rounds)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: RingAttention, mask: Tensor | None) -> Tensor:
        batch, heads, _, dim = q.shape
        masks = [None] * len(ring.chunks) if mask is None else mask.split(ring.chunks, dim=-1)
        rounds = len(ring.chunks)
        with ring.traffic.copying():
            held = torch.stack((k, v))
        out = lse = None
        for done in range(rounds):
            works: list[dist.Work] = []
            if done + 1 < rounds:
                coming = held.new_empty(2, batch, heads, ring.size_after(done + 1), dim)
                works = ring.exchange(held, coming)
                ring.traffic.add(held.nbytes)
            if q.shape[2] and held.shape[3]:  # a chunk of a short stream may be empty; it travels all the same
                part, part_lse = ring.kernel.with_lse(q, held[0], held[1], masks[ring.held_after(done)])
                if out is None or lse is None:
                    out, lse = part.to(torch.float32, copy=True), part_lse
                else:
                    out, lse = merge(out, lse, part, part_lse)
            if works:
                with ring.traffic.waiting():  # the kernel has hidden the rest
                    for work in works:
                        work.wait()
                held = coming
        if out is None or lse is None:
            out, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_zeros(q.shape[:3], dtype=torch.float32)
        result = out.to(q.dtype)
        ctx.ring, ctx.masked = ring, mask is not None
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Passes the chunks around once more, each with its gradient so far; a last hop returns it to its owner."""
        q, k, v, out, lse = ctx.saved_tensors
        ring: RingAttention = ctx.ring
        if ctx.masked:
            raise UnsupportedError(
                "gradients through ring attention are not available with a mask: set ring_degree to 1"
            )
        rounds = len(ring.chunks)
        held = torch.stack((k, v))
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grad_held = torch.zeros_like(held, dtype=torch.float32)
        for done in range(rounds):
            if q.shape[2] and held.shape[3]:
                part_q, part_k, part_v = ring.kernel.backward(grad.contiguous(), q, held[0], held[1], out, lse)
                grad_q += part_q
                grad_held[0] += part_k
                grad_held[1] += part_v
            shape = (*held.shape[:3], ring.size_after(done + 1), held.shape[4])
            works = []
            if done + 1 < rounds:
                coming = held.new_empty(shape)
                works += ring.exchange(held, coming)
            grad_coming = grad_held.new_empty(shape)
            works += ring.exchange(grad_held, grad_coming)
            for work in works:
                work.wait()
            if done + 1 < rounds:
                held = coming
            grad_held = grad_coming
        return grad_q.to(q.dtype), grad_held[0].to(k.dtype), grad_held[1].to(v.dtype), None, None
