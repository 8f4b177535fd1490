"""The ranks that share a sequence, as a split model sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.between import StreamAttention
from ..attention.common_memory import CommonMemoryExchange
from ..attention.kernels import Kernel, Sdpa
from ..attention.row_check import RowCheck
from ..attention.traffic import Traffic
from ..attention.ulysses import all_to_all
from ..plan import AttentionPlan


class SequenceRanks:
    """This rank and the others that share a sequence, arranged as a ring of Ulysses groups.

    Args:
        weights: relative speed of each rank.
        rank: index of this rank.
        ulysses: process group of the ranks with the same chunk of the sequence; required if there are several.
        ring: process group of the ranks with the same heads; required if there are several.
        ring_degree: number of chunks.
        kernel: local attention of a ring.
        chosen: the user's choice of local attention, which replaces the model's own wherever no mask is passed.
        pipeline: number of chunks of heads by which exchange and kernel overlap.
        pipeline_from: number of tokens from which the overlap outweighs its launches.
        traffic: counts the bytes that are sent.
        common: exchange of the CPU ranks of a Ulysses group without collectives.
        launched: counts a ring's exchanges, see `RingAttention`.
        check: compares the first attention of each kind with an exact one.
        enter_block: called before each block, by all ranks alike; may raise to stop them all.
    """

    def __init__(
        self,
        weights: Sequence[float],
        rank: int = 0,
        *,
        ulysses: dist.ProcessGroup | None = None,
        ring: dist.ProcessGroup | None = None,
        ring_degree: int = 1,
        kernel: Kernel | None = None,
        chosen: Kernel | None = None,
        pipeline: int = 1,
        pipeline_from: int = 0,
        traffic: Traffic | None = None,
        common: CommonMemoryExchange | None = None,
        launched: Counter[str] | None = None,
        check: RowCheck | None = None,
        enter_block: Callable[[], None] = lambda: None,
    ):
        self.weights = tuple(weights)
        self.rank = rank
        self.size = len(self.weights)
        self.ring_degree = ring_degree
        self.traffic = traffic or Traffic()
        self.enter_block = enter_block
        self.chosen = chosen
        self._ulysses, self._ring = ulysses, ring
        self._kernel = kernel or Sdpa()
        self._pipeline, self._pipeline_from, self._common = pipeline, pipeline_from, common
        self._launched, self._check = launched, check
        self._attentions: dict[AttentionPlan, StreamAttention] = {}

    def attention(self, plan: AttentionPlan) -> StreamAttention:
        """Returns the exchange of one attention, which is created once per plan."""
        if plan not in self._attentions:
            self._attentions[plan] = StreamAttention(
                plan,
                self.rank,
                self._ulysses,
                self._ring,
                self._kernel,
                pipeline=self._pipeline if sum(plan.tokens) >= self._pipeline_from else 1,
                traffic=self.traffic,
                common=self._common,
                launched=self._launched,
                check=self._check,
            )
        return self._attentions[plan]

    def gather(self, x: Tensor, dim: int, counts: Sequence[int]) -> Tensor:
        """Concatenates the `x` of all ranks along `dim`; that of rank r has `counts[r]` entries. Differentiable: the
        gradients from all ranks return to the rank that owns `x`, and are summed there."""
        width = self.size // self.ring_degree
        row = self.rank // width * width
        x = self._gather(x, dim, counts[row : row + width], self._ulysses)
        rows = [sum(counts[start : start + width]) for start in range(0, self.size, width)]
        return self._gather(x, dim, rows, self._ring)

    def largest(self, x: Tensor) -> Tensor:
        """Returns the element-wise maximum of all ranks' `x`."""
        found = x.float()  # exact, and supported by every backend
        with self.traffic.waiting():
            for group in (self._ulysses, self._ring):
                if group is not None:
                    dist.all_reduce(found, dist.ReduceOp.MAX, group)
        return found.to(x.dtype)

    def _gather(self, x: Tensor, dim: int, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
        if len(counts) == 1:
            return x
        assert group is not None
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in counts]
        sizes = [prod(shape) for shape in shapes]
        flat = x.reshape(-1)
        with self.traffic.waiting():
            came = all_to_all(torch.cat([flat] * len(counts)), [flat.numel()] * len(counts), sizes, group)
        self.traffic.add(flat.nbytes * (len(counts) - 1))
        return torch.cat([part.view(shape) for part, shape in zip(came.split(sizes), shapes, strict=True)], dim)
