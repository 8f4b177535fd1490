"""The process group of a worker, and a step's view of it."""

from __future__ import annotations

import collections
import datetime

import torch
import torch.distributed as dist

from ..adapters.base import Attention, StepContext
from ..attention.kernels import Kernel
from ..attention.ulysses import UlyssesAttention
from ..errors import StepCancelled
from ..plan import SequencePlan
from ..wire.control import ControlPage

# Peers of a failed rank are released by the host, which ends the group; this is the last resort.
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)

_RUN_AHEAD = 2
"""Blocks that the host code may be ahead of a CUDA device, so that Cancel is quick and launches still overlap."""


def join(rank: int, world_size: int, device: torch.device, store: str) -> dist.ProcessGroup:
    """Meets the other ranks through a file (no listening socket) and returns the group of all of them."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None
    dist.barrier()  # every rank has read the store; its file can go
    return group


class ParallelContext(StepContext):
    """All ranks share the sequence."""

    def __init__(
        self,
        rank: int,
        weights: tuple[float, ...],
        group: dist.ProcessGroup,
        kernel: Kernel,
        control: ControlPage,
        device: torch.device,
    ):
        self.rank = rank
        self._weights = weights
        self._group = group
        self._kernel = kernel
        self._control = control
        self._block = 0
        self._events: collections.deque[torch.cuda.Event] | None = (
            collections.deque() if device.type == "cuda" else None
        )

    def plan(self, streams: tuple[int, ...], heads: int) -> SequencePlan:
        return SequencePlan(streams, heads, self._weights)

    def attention(self, plan: SequencePlan) -> Attention:
        if plan.world_size == 1:
            return SoloContext(self._kernel).attention(plan)
        return UlyssesAttention(plan, self.rank, self._group, self._kernel)

    def enter_block(self, plan: SequencePlan) -> None:
        run_ahead = 0
        if self._events is not None:
            run_ahead = _RUN_AHEAD
            if len(self._events) == _RUN_AHEAD:
                self._events.popleft().synchronize()
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
        self._control.beat(self.rank)
        block, self._block = self._block, self._block + 1
        if self._control.should_stop(block, leader=self.rank == plan.leader, run_ahead=run_ahead):
            raise StepCancelled(f"stopped before block {block}")


class SoloContext(StepContext):
    """One rank that owns everything: the reference of the self-check."""

    rank = 0

    def __init__(self, kernel: Kernel):
        self._kernel = kernel

    def plan(self, streams: tuple[int, ...], heads: int) -> SequencePlan:
        return SequencePlan(streams, heads, (1.0,))

    def attention(self, plan: SequencePlan) -> Attention:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        return attend

    def enter_block(self, plan: SequencePlan) -> None:
        pass
