"""One of two ranks whose waits are timed: python -m tests.distributed.exposed_ranks RANK WORLD STORE RESULTS MEMORY

Rank 1 comes to every attention late. MEMORY is an empty file, the common memory of both.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.attention.common_memory import CommonMemory, CommonMemoryExchange
from parallel.attention.joint import joint_attention
from parallel.attention.kernels import Sdpa
from parallel.attention.traffic import Traffic
from parallel.plan import SequencePlan

LATE_S = 0.3
"""How much later than rank 0 rank 1 comes."""
BUSY_S = 0.5
"""How long a busy kernel computes."""


class Busy(Sdpa):
    """A kernel that takes its time."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(BUSY_S)
        return super().with_lse(q, k, v)


def main(rank: int, world: int, store: str, results: str, memory: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)
    group = dist.group.WORLD
    assert group is not None
    ulysses, ring = SequencePlan((64,), 4, (1.0, 1.0)), SequencePlan((64,), 4, (1.0, 1.0), 2)
    x = torch.randn(1, 32, 4, 16)
    figures: dict[str, Traffic] = {"ulysses": Traffic(), "ring": Traffic(), "busy ring": Traffic()}
    attentions = {
        "ulysses": joint_attention(ulysses, rank, group, None, Sdpa(), traffic=figures["ulysses"]),
        "ring": joint_attention(ring, rank, None, group, Sdpa(), traffic=figures["ring"]),
        "busy ring": joint_attention(ring, rank, None, group, Busy(), traffic=figures["busy ring"]),
    }
    if CommonMemory.supported():
        descriptor = os.open(memory, os.O_RDWR)
        common = CommonMemoryExchange(CommonMemory(descriptor, rank, world), 0, range(world))
        figures["common memory"] = Traffic()
        attentions["common memory"] = joint_attention(
            ulysses, rank, group, None, Sdpa(), traffic=figures["common memory"], common=common
        )
    for attention in attentions.values():
        dist.barrier()
        if rank == 1:
            time.sleep(LATE_S)
        with torch.no_grad():
            attention(x, x, x)
    Path(results).write_text(json.dumps({name: traffic.to_json() for name, traffic in figures.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
