"""The ranks as a grid with the axes (dp, cfg, ring, ulysses), and this process's place in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .degrees import Degrees

AXES = ("dp", "cfg", "ring", "ulysses")


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's process groups along the axes.

    All ranks must build the same meshes in the same order: building one is a collective operation.
    """

    degrees: Degrees
    rank: int
    """In the world."""
    ring: dist.ProcessGroup
    ulysses: dist.ProcessGroup

    @classmethod
    def build(cls, degrees: Degrees, device_type: str) -> Mesh:
        shape = (degrees.dp, degrees.cfg, degrees.ring, degrees.ulysses)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        return cls(degrees, dist.get_rank(), mesh.get_group("ring"), mesh.get_group("ulysses"))

    @property
    def group(self) -> int:
        """Which group of samples this rank works on, 0 … degrees.groups − 1."""
        return self.rank // self.degrees.sp

    @property
    def sp_rank(self) -> int:
        """Rank among those that share the sequence."""
        return self.rank % self.degrees.sp

    def members(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The part of a per-rank table that belongs to this rank's sequence-parallel group."""
        start = self.group * self.degrees.sp
        return weights[start : start + self.degrees.sp]
