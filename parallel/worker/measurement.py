"""Benchmark measurements in a worker: attention's exchange and kernel without a model around them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention.joint import JointAttention
from ..attention.kernels import Kernel
from ..attention.traffic import Traffic
from ..plan import AttentionPlan


class Slowed(TorchDispatchMode):
    """Simulates a device that is `times` times slower by repeating every operation without side effects.

    Communication keeps its speed.
    """

    def __init__(self, times: int):
        super().__init__()
        self._again = range(times - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        traceless = not schema.is_mutable and all(argument.name != "generator" for argument in schema.arguments)
        if func.namespace == "aten" and (traceless or func is torch.ops.aten.copy_.default):
            for _ in self._again:
                func(*args, **kwargs)
        return func(*args, **kwargs)


def measure_attention(
    attend: JointAttention,
    traffic: Traffic,
    plan: AttentionPlan,
    rank: int,
    kernel: Kernel,
    *,
    batch: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    check: bool,
) -> dict[str, Any]:
    """Measures one joint attention on random data, as one rank of `plan` runs it.

    Args:
        attend: the attention to measure, which uses `kernel`.
        traffic: counters of `attend`, all zero at the start.
        check: also compare this rank's rows with attention over the whole sequence.

    Returns:
        `ms`; `kernel_ms`, the time of the same arithmetic without any exchange; the counters of `traffic`; with
        `check`, `max_abs_err`.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, sum(plan.tokens), plan.heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator).to(device, dtype)
    start, stop = plan.token_ranges[rank]
    mine = [x[:, start:stop] for x in (q, k, v)]
    with torch.no_grad():
        if plan.world_size > 1:
            dist.barrier()
        out, seconds = _timed(lambda: attend(*mine), device)
    traffic.read_events()
    result: dict[str, Any] = {"ms": seconds * 1000, **traffic.to_json()}
    row, heads = plan.row(rank), slice(*plan.head_ranges[rank])
    tokens = slice(plan.token_ranges[row.start][0], plan.token_ranges[row.stop - 1][1])
    with torch.no_grad():
        parts = (q[:, tokens, heads], k[:, :, heads], v[:, :, heads])
        local = [part.contiguous().transpose(1, 2) for part in parts]  # other heads in between would slow it down
        result["kernel_ms"] = _timed(lambda: kernel(*local), device)[1] * 1000 if local[0].shape[1] else 0.0
        if check:
            whole = kernel(mine[0].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
            result["max_abs_err"] = (whole - out).abs().max().item()
    return result


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out, time.perf_counter() - began
