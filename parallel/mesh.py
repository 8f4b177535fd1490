"""The ranks as a grid with the axes (dp, cfg, ring, ulysses), and this process's position in it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from .degrees import Degrees

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)
"""Timeout of every process group: compiling may take longer than NCCL's default of ten minutes. It is the last resort:
the host releases the peers of a failed rank by ending the group."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's process groups along the axes.

    All ranks must build the same meshes in the same order: building one is a collective operation.
    """

    degrees: Degrees
    rank: int
    """Rank of this process in the world."""
    ring: dist.ProcessGroup | None
    """Process group of the ranks with the same heads; None if this rank is the only one."""
    ulysses: dist.ProcessGroup | None
    """Process group of the ranks with the same chunk of the sequence; None if this rank is the only one."""

    @classmethod
    def build(cls, degrees: Degrees) -> Mesh:
        ranks = range(degrees.world_size)
        sp, ulysses = degrees.sp, degrees.ulysses
        columns = [ranks[start + i : start + sp : ulysses] for start in ranks[::sp] for i in range(ulysses)]
        rows = [ranks[start : start + ulysses] for start in ranks[::ulysses]]
        return cls(degrees, dist.get_rank(), _group(columns), _group(rows))

    def sequence(self) -> dist.ProcessGroup | None:
        """Returns the process group of the ranks that share a sequence; None if this rank is the only one.

        With both a ring and Ulysses it is a separate group, created at each call: all ranks of the world must call.
        """
        if self.degrees.ring == 1:
            return self.ulysses
        if self.degrees.ulysses == 1:
            return self.ring
        ranks, sp = range(self.degrees.world_size), self.degrees.sp
        return _group([ranks[start : start + sp] for start in ranks[::sp]])

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """All-reduces `tensor` in place over the ranks that share a sequence, which must all call: along one axis, then
        along the other, so that it needs no group of its own."""
        for group in (self.ulysses, self.ring):
            if group is not None:
                dist.all_reduce(tensor, op, group=group)

    @property
    def ulysses_ranks(self) -> range:
        """World ranks of the process group `ulysses`."""
        start = self.rank // self.degrees.ulysses * self.degrees.ulysses
        return range(start, start + self.degrees.ulysses)

    @property
    def group(self) -> int:
        """Index of the group of samples that this rank works on, 0 … degrees.groups − 1."""
        return self.rank // self.degrees.sp

    @property
    def sp_rank(self) -> int:
        """Rank among the ranks that share the sequence."""
        return self.rank % self.degrees.sp

    def members(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """Returns the entries of a per-rank table that belong to this rank's sequence-parallel group."""
        start = self.group * self.degrees.sp
        return weights[start : start + self.degrees.sp]


def _group(parts: Sequence[range]) -> dist.ProcessGroup | None:
    """Partitions the world into process groups, and returns this rank's.

    A group is expensive: with NCCL it has a communicator and buffers, with gloo a thread that wakes a hundred times a
    second. So a single rank gets None, and all ranks together get the world's own group. The axes dp and cfg need no
    groups, since they send nothing.
    """
    if len(parts[0]) == 1:
        return None
    if len(parts) == 1:
        return dist.group.WORLD
    return dist.new_subgroups_by_enumeration([list(part) for part in parts], timeout=COLLECTIVE_TIMEOUT)[0]
