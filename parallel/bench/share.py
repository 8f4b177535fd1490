"""One rank's exact share of a large world, on one device and without peers.

PyTorch's "fake" process group moves no data: arithmetic, packing and kernel launches are those of the real rank, but
results are meaningless, and the time does not include the cost of a link.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..attention.joint import joint_attention
from ..attention.kernels import select
from ..attention.traffic import Traffic
from ..degrees import RequestedDegrees
from ..errors import ConfigError
from ..mesh import Mesh
from ..plan import AttentionPlan
from ..worker.measurement import measure_attention
from .run import Workload


def bench_share(work: Workload, world_size: int, rank: int) -> tuple[dict[str, Any], str]:
    """Times one attention as rank `rank` of `world_size` runs it.

    Raises:
        ConfigError: the rank does not exist, or the degrees do not fit the world.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}; in a world of {world_size} allowed are 0 to {world_size - 1}")
    degrees, _ = RequestedDegrees(world_size=world_size, ring=work.ring_degree, ulysses=work.ulysses_degree).choose(
        conditions=1, heads=work.heads
    )
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = Mesh.build(degrees)
        plan = AttentionPlan.of_sequence(work.tokens + work.text, work.heads, (1.0,) * world_size, degrees.ring)
        kernel = select("auto", device)
        times = []
        for _ in range(work.rounds + 1):
            traffic = Traffic(on_cuda=device.type == "cuda")
            attend = joint_attention(plan, mesh.sp_rank, mesh.ulysses, mesh.ring, kernel, work.pipeline, traffic)
            times.append(
                measure_attention(
                    attend, traffic, plan, mesh.sp_rank, kernel,
                    batch=work.batch, head_dim=work.head_dim, dtype=work.dtype, device=device, check=False,
                )
            )  # fmt: skip
    finally:
        dist.destroy_process_group()
    best = min(times[1:], key=lambda t: t["ms"])
    result = {
        "mode": f"share of rank {rank}: {degrees}", "tokens": work.tokens, "text": work.text, "heads": work.heads,
        "world": world_size, "collectives_per_attention": best["collectives"],
        "bytes_sent_per_attention": best["bytes_sent"], "ms": round(best["ms"], 3),
        "kernel_ms": round(best["kernel_ms"], 3), "device": device.type,
    }  # fmt: skip
    return result, "\n".join(f"{name:28}{value}" for name, value in result.items())
