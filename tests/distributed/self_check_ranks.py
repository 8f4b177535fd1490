"""One rank of the self-check's tests.

Started as `python -m tests.distributed.self_check_ranks RANK WORLD STORE RESULTS CHECKPOINT …`.

Each checkpoint is checked as it is, and with faults in what the split writes. The split is a ring:
its merged chunks are rounded otherwise than the reference on every token, as kernels for other row counts round on a
GPU; Ulysses on a CPU gives the reference's bits.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.adapters.base import Adapter, StepContext
from parallel.attention.kernels import Sdpa
from parallel.degrees import Degrees
from parallel.errors import UnsupportedError
from parallel.wire.control import ControlPage
from parallel.worker import comparison
from parallel.worker.ranks import ParallelContext, Ranks, SoloContext
from parallel.worker.resident import ResidentModel

FAULTS = {"": 1.0, "1 % too large": 1.01, "2 % too small": 0.98, "one rank's is not a number": torch.nan}


@dataclass(frozen=True)
class Result:
    """What one rank saw."""

    family: str
    dtype: str
    fault: str
    message: str
    """Of the self-check, if it failed."""
    norm: float
    """The difference, relative to what is allowed."""
    slope: float
    noise: float | None
    """Norm of the network's noise, where it is measured."""


@contextmanager
def fault_in_splits(adapter: Adapter, fault: str) -> Iterator[None]:
    """Inside, what a split step writes is multiplied; what a single rank writes is right."""
    step = adapter.step
    alone = "one rank's" in fault

    def wrong(model: Any, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext) -> None:
        before = out.clone()
        step(model, x, timestep, prepared, out, context)
        if isinstance(context, ParallelContext) and (not alone or context.rank == 0):
            out[out != before] *= FAULTS[fault]

    with mock.patch.object(type(adapter), "step", lambda self, *arguments: wrong(*arguments)):
        yield


def check(model: ResidentModel, ranks: Ranks, page: ControlPage, fault: str) -> Result:
    degrees = Degrees(ring=ranks.world_size)
    context = ParallelContext(ranks, ranks.mesh(degrees), page)
    found: list[comparison.Difference] = []
    limits: list[comparison.Allowed] = []
    original, within = comparison.difference, comparison.Difference.within

    def difference(sums: Tensor) -> comparison.Difference:
        found.append(original(sums))
        return found[-1]

    def noted(self: comparison.Difference, allowed: comparison.Allowed) -> bool:
        limits.append(allowed)
        return within(self, allowed)

    message = ""
    with (
        torch.no_grad(),
        fault_in_splits(model.adapter, fault),
        mock.patch.object(comparison, "difference", difference),
        mock.patch.object(comparison.Difference, "within", noted),
    ):
        try:
            model.self_check(context, SoloContext(ranks.kernel), degrees, context.add_up)
        except UnsupportedError as error:
            message = str(error)
    return Result(
        family=model.adapter.family,
        dtype=str(model.compute_dtype).removeprefix("torch."),
        fault=fault,
        message=message,
        norm=found[0].norm / limits[0].norm,
        slope=found[0].slope / limits[0].slope,
        noise=found[1].norm if len(found) > 1 else None,
    )


def main(rank: int, world: int, store: str, results: str, *checkpoints: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)
    page = ControlPage.create()
    page.reset(world)
    ranks = Ranks((1.0,) * world, torch.device("cpu"), Sdpa())
    found = []
    for path in checkpoints:
        for dtype in ("bfloat16", "float32"):
            recipe = {"path": path, "weight_dtype": dtype, "compute_dtype": dtype}
            model = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)
            found += [check(model, ranks, page, fault) for fault in FAULTS]
    Path(results).write_text(json.dumps([asdict(result) for result in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
