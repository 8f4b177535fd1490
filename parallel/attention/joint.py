"""Joint attention, put together from a plan: Ulysses inside, a ring across, or neither."""

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
        """q, k, v: this rank's tokens with all heads, [B, S_r, H, D]. Returns the same shape."""


class Unexchanged:
    """All heads stay with their tokens: one rank alone, or a ring without Ulysses."""

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
    """The attention of `plan` for `rank`; the groups are needed where their degree is above 1.

    What is sent is added to `traffic`. `common` is the Ulysses group's, see `UlyssesAttention`; `launched` the ring's,
    see `RingAttention`. `compute` takes the kernel's place where there is no ring.
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
