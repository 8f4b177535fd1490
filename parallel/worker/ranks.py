"""The process groups of a worker, and a step's view of them."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable
from functools import partial

import torch
import torch.distributed as dist

from ..attention.common_memory import CommonMemory, CommonMemoryExchange
from ..attention.joint import JointAttention, joint_attention
from ..attention.kernels import Kernel
from ..attention.row_check import Kind, RowCheck
from ..attention.traffic import Traffic
from ..cache.blocks import Total
from ..degrees import Degrees
from ..errors import StepCancelled
from ..mesh import COLLECTIVE_TIMEOUT, Mesh
from ..plan import AttentionPlan
from ..split import SequenceRanks
from ..wire.control import ControlPage
from .run_ahead import Paces, RunAhead

_PIPELINE_FROM = 8192
"""Tokens per sequence from which attention outweighs the launches of a second chunk of heads (CUDA only; an estimate
from HunyuanVideo's shapes)."""


def join(rank: int, world_size: int, device: torch.device, store: int) -> None:
    """Joins the process group through an unnamed file, inherited as the descriptor `store`, which needs no listening
    socket and leaves no file behind."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.FileStore(f"/proc/self/fd/{store}", world_size),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    dist.barrier()


class Ranks:
    """The meshes and process groups of this rank, for any degrees, created on first use and kept.

    Args:
        weights: relative speed of each rank of the world.
        memory: common memory of CPU ranks, if they have it.
        chosen: whether the user has chosen the kernel; otherwise the model's own attention runs, except in a ring.
        alone: whether this rank runs without peers, as in a benchmark of one rank's share. Data received from peers is
            then arbitrary, so attention is not checked.

    Attributes:
        chosen: the kernel that the user has chosen, if any.
    """

    def __init__(
        self,
        weights: tuple[float, ...],
        device: torch.device,
        kernel: Kernel,
        memory: CommonMemory | None = None,
        *,
        chosen: bool = False,
        alone: bool = False,
    ):
        self.chosen = kernel if chosen else None
        self.weights = weights
        self.device = device
        self.kernel = kernel
        self.memory = memory
        self._alone = alone
        self._meshes: dict[Degrees, Mesh] = {}
        self._common: dict[Degrees, CommonMemoryExchange] = {}
        self._sequences: dict[Degrees, dist.ProcessGroup | None] = {}
        self._weights_groups: dict[int, dist.ProcessGroup] = {}
        self._ring_exchanges: collections.Counter[str] = collections.Counter()
        self._passed: set[Kind] = set()
        self._paces: Paces = {}

    @property
    def world_size(self) -> int:
        return len(self.weights)

    def mesh(self, degrees: Degrees) -> Mesh:
        """Returns the mesh of `degrees`. All ranks must request the same meshes in the same order."""
        if degrees not in self._meshes:
            self._meshes[degrees] = mesh = Mesh.build(degrees)
            if self.memory is not None:
                self._common[degrees] = CommonMemoryExchange(self.memory, len(self._common), mesh.ulysses_ranks)
        return self._meshes[degrees]

    def total(self, mesh: Mesh, traffic: Traffic) -> Total:
        """Returns a function that sums a tensor over the ranks that share a sequence.

        All ranks of the world must call this method, in the same order.
        """
        if mesh.degrees not in self._sequences:
            self._sequences[mesh.degrees] = mesh.sequence()
        group = self._sequences[mesh.degrees]

        def total(sums: torch.Tensor) -> None:
            if group is not None:
                with traffic.waiting():
                    dist.all_reduce(sums, group=group)
                traffic.add(sums.nbytes)

        return total

    def weights_group(self, sharing: int) -> dist.ProcessGroup:
        """Returns the process group of the `sharing` ranks that share a sequence and shard its weights.

        All ranks of the world must call it. On CUDA it is a group of its own, because its collectives are launched a
        block ahead, and the collectives of one group run in launch order.
        """
        if sharing not in self._weights_groups:
            parts = [range(start, start + sharing) for start in range(0, self.world_size, sharing)]
            group = self.mesh(Degrees(dp=len(parts), ulysses=sharing)).ulysses
            if self.device.type == "cuda":
                group = dist.new_subgroups_by_enumeration([list(part) for part in parts], timeout=COLLECTIVE_TIMEOUT)[0]
            assert group is not None, "more than one rank"
            self._weights_groups[sharing] = group
        return self._weights_groups[sharing]

    def sequence(self, mesh: Mesh, context: ParallelContext, attention: str, work: Hashable) -> SequenceRanks:
        """Returns the ranks that share a sequence with this rank under `mesh`, for a network under a split plan.

        Args:
            context: context of the call.
            attention: name of the attention that the model uses outside of a ring.
            work: identifies calls of the same duration.
        """
        weights = mesh.members(self.weights)
        # The fastest rank leads: it owns tokens and a head under the plan of every attention.
        leader = weights.index(max(weights))
        return SequenceRanks(
            weights,
            mesh.sp_rank,
            ulysses=mesh.ulysses,
            ring=mesh.ring,
            ring_degree=mesh.degrees.ring,
            kernel=self.kernel,
            chosen=self.chosen,
            pipeline=2 if self.device.type == "cuda" else 1,
            pipeline_from=_PIPELINE_FROM,
            traffic=context.traffic,
            common=self.common(mesh),
            launched=self._ring_exchanges,
            check=self.row_check(mesh, self.kernel.name if mesh.degrees.ring > 1 or self.chosen else attention),
            enter_block=partial(context.enter_block, leader, work),
        )

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def joint_attention(self, plan: AttentionPlan, mesh: Mesh, pipeline: int, traffic: Traffic) -> JointAttention:
        """Returns this rank's part of the joint attention of `plan` under `mesh`."""
        common = self.common(mesh)
        return joint_attention(
            plan, mesh.sp_rank, mesh.ulysses, mesh.ring, self.kernel, pipeline, traffic, common, self._ring_exchanges
        )

    def launched(self) -> dict[str, int]:
        """Returns how many operations this rank has launched in each group, by a name that the group's ranks share.

        If the counts of two ranks of a group differ, one rank waits, or will wait, for an operation that the other has
        not begun.

        PyTorch counts the collectives of a process group (`ProcessGroupNCCL::getSequenceNumberForGroup`; NCCL's before
        they are launched) and gives a group the same name on all its ranks, which use it to find each other. NCCL's
        count excludes point-to-point operations, and common memory belongs to no process group: attention counts both.
        """
        meshes = self._meshes.values()
        of_meshes = itertools.chain.from_iterable((mesh.ring, mesh.ulysses) for mesh in meshes)
        groups = [dist.group.WORLD, *of_meshes, *self._sequences.values(), *self._weights_groups.values()]
        counts = {
            f"group {group.group_name}": group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # no stub
            for group in groups
            if group is not None
        }
        counts |= {f"ring {name}": count for name, count in self._ring_exchanges.items()}
        counts |= {exchange.name: exchange.launched for exchange in self._common.values()}
        made = len(self._meshes) + len(self._sequences) + len(self._weights_groups)
        return counts | {"meshes and groups made by the world": made}

    def common(self, mesh: Mesh) -> CommonMemoryExchange | None:
        """Returns the common-memory exchange of the mesh's Ulysses group, if it has one."""
        return self._common.get(mesh.degrees)

    def run_ahead(self, mesh: Mesh) -> RunAhead | None:
        """Returns the run-ahead control of one pass under `mesh`; None on a CPU, where nothing is queued."""
        if self.device.type != "cuda":
            return None

        def slowest(pace: float) -> float:
            paces = torch.tensor([pace], device=self.device)
            mesh.reduce(paces, dist.ReduceOp.MAX)
            return float(paces)

        # blocking: a worker that waits for its GPU leaves its core to other work
        return RunAhead(self._paces, slowest, partial(torch.cuda.Event, enable_timing=True, blocking=True))

    def row_check(self, mesh: Mesh, kernel: str) -> RowCheck | None:
        """Returns the check that compares the first attention of each kind with exact attention; None without peers."""
        if self._alone:
            return None
        return RowCheck(mesh, kernel, self._passed.__contains__, self._passed.add)


class ParallelContext:
    """A step under a mesh, in which this rank's sequence-parallel group shares a sequence.

    Args:
        first_block: number of the first block; block numbers increase through all steps of one call of the host.
    """

    def __init__(self, ranks: Ranks, mesh: Mesh, control: ControlPage, first_block: int = 0):
        self.rank = mesh.sp_rank
        self._mesh = mesh
        self._control = control
        self._block = first_block
        self.traffic = Traffic(on_cuda=ranks.device.type == "cuda")
        self._run_ahead = ranks.run_ahead(mesh)

    def enter_block(self, leader: int, work: Hashable) -> None:
        """Sends a heartbeat before a block, and stops at the block on which all ranks agree.

        Args:
            leader: rank of the sequence that publishes the block at which to stop.
            work: see `Ranks.sequence`.

        Raises:
            StepCancelled: the ranks stop before this block.
        """
        # Two requests of a pass may differ in length; the pace of the first is used for both.
        run_ahead = self._run_ahead.enter((work, self._mesh.degrees)) if self._run_ahead is not None else 0
        self._control.beat(self._mesh.rank)
        block, self._block = self._block, self._block + 1
        leads = self.rank == leader
        if self._control.should_stop(block, group=self._mesh.group, leader=leads, run_ahead=run_ahead):
            raise StepCancelled(f"stopped before block {block}")

    def finish(self) -> None:
        """Reads the times that CUDA events have recorded. Called when the device has finished the pass."""
        self.traffic.read_events()
        if self._run_ahead is not None:
            self._run_ahead.finish()
