"""One of two ranks whose waits are timed: python -m tests.distributed.exposed_ranks RANK WORLD STORE RESULTS MEMORY

Rank 1 comes to every attention late. MEMORY is an empty file, the common memory of both.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.attention.common_memory import CommonMemory, CommonMemoryExchange
from parallel.attention.joint import joint_attention
from parallel.attention.kernels import Sdpa
from parallel.attention.traffic import Traffic
from parallel.plan import AttentionPlan
from tests.distributed.devices import meet

LATE_S = 0.3
"""How much later than rank 0 rank 1 comes."""
BUSY_S = 0.5
"""How long a busy kernel computes."""


class Busy(Sdpa):
    """A kernel that takes its time."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if q.device.type == "cuda":
            torch.cuda._sleep(int(BUSY_S * _cycles_per_s()))
        else:
            time.sleep(BUSY_S)
        return super().with_lse(q, k, v, mask)


@lru_cache
def _cycles_per_s() -> float:
    """Of the clock that `torch.cuda._sleep` counts."""
    cycles, (first, last) = 50_000_000, (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first time warms up
        first.record()
        torch.cuda._sleep(cycles)
        last.record()
        last.synchronize()
    return cycles / (first.elapsed_time(last) / 1000)


def main(rank: int, world: int, store: str, results: str, memory: str) -> None:
    device = meet(rank, world, store)
    group = dist.group.WORLD
    assert group is not None
    ulysses, ring = (AttentionPlan.of_sequence(64, 4, (1.0, 1.0), ring_degree) for ring_degree in (1, 2))
    x = torch.randn(1, 32, 4, 16, device=device)
    on_cuda = device.type == "cuda"
    figures = {name: Traffic(on_cuda=on_cuda) for name in ("ulysses", "ring", "busy ring")}
    attentions = {
        "ulysses": joint_attention(ulysses, rank, group, None, Sdpa(), traffic=figures["ulysses"]),
        "ring": joint_attention(ring, rank, None, group, Sdpa(), traffic=figures["ring"]),
        "busy ring": joint_attention(ring, rank, None, group, Busy(), traffic=figures["busy ring"]),
    }
    if not on_cuda and CommonMemory.supported():
        descriptor = os.open(memory, os.O_RDWR)
        common = CommonMemoryExchange(CommonMemory(descriptor, rank, world), 0, range(world))
        figures["common memory"] = Traffic()
        attentions["common memory"] = joint_attention(
            ulysses, rank, group, None, Sdpa(), traffic=figures["common memory"], common=common
        )
    if on_cuda:  # NCCL connects two ranks when they first exchange something, which takes a second
        _cycles_per_s()
        for sequence, groups in ((ulysses, (group, None)), (ring, (None, group))):
            joint_attention(sequence, rank, *groups, Sdpa(), traffic=Traffic(on_cuda=True))(x, x, x)
    for name, attention in attentions.items():
        dist.barrier()
        if rank == 1:
            time.sleep(LATE_S)
        with torch.no_grad():
            attention(x, x, x)
        if on_cuda:
            torch.cuda.synchronize()
        figures[name].read_events()
    Path(results).write_text(json.dumps({name: traffic.to_json() for name, traffic in figures.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
