"""Joint attention built from a plan: Ulysses within a row of ranks, a ring across rows, both or neither."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ..plan import AttentionPlan
from .common_memory import CommonMemoryExchange
from .kernels import Kernel
from .ring import RingAttention
from .traffic import Traffic
from .ulysses import Local, UlyssesAttention


class JointAttention(Protocol):
    """Attention of this rank's tokens with those of all ranks that share the sequence."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes attention of q, k, v, this rank's tokens with all heads, [B, S_r, H, D]. Returns the same shape."""


class Unexchanged:
    """Attention without a Ulysses exchange: all heads stay with their tokens (a single rank, or a ring alone)."""

    def __init__(self, local: Local):
        self._local = local

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._local(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def joint_attention(
    plan: AttentionPlan,
    rank: int,
    ulysses: dist.ProcessGroup | None,
    ring: dist.ProcessGroup | None,
    kernel: Kernel,
    pipeline: int = 1,
    traffic: Traffic | None = None,
    common: CommonMemoryExchange | None = None,
    launched: Counter[str] | None = None,
    compute: Local | None = None,
) -> JointAttention:
    """Builds the attention of `plan` for `rank`; a group is required if its degree is above 1.

    `traffic` counts the bytes sent. `common` is the Ulysses group's exchange, see `UlyssesAttention`; `launched` counts
    the ring's exchanges, see `RingAttention`. Without a ring, `compute` replaces the kernel.
    """
    traffic = traffic or Traffic()
    local: Local = compute or kernel
    if plan.ring_degree > 1:
        assert ring is not None
        local = RingAttention(plan.chunks, rank // plan.ulysses_degree, ring, kernel, traffic, launched)
    if plan.ulysses_degree == 1:
        return Unexchanged(local)
    assert ulysses is not None
    return UlyssesAttention(plan, rank, ulysses, local, pipeline, traffic, common)
