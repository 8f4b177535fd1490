"""This engine beside diffusers' own context parallelism: one step of a tiny FLUX on two CPU ranks, in one run.

    python -m tests.benchmarks.cpu_flux_context_parallel [--rounds 15] [--image 240] [--text 16] [--layers 8]

So small that communication bounds it. Each engine is compared with itself on one process; what is above half of that,
per layer, is what splitting costs. One thread in every process; runs alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist

from parallel.attention.common_memory import CommonMemory
from parallel.attention.kernels import Sdpa
from parallel.degrees import Degrees
from parallel.diffusers.folder import NetworkFile
from parallel.diffusers.tiny import write_tiny
from parallel.plans.diffusers import PLANS
from parallel.split import SequenceRanks, Split
from parallel.split.routes import ThroughTorch
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks

ROOT = Path(__file__).parents[2]
NETWORK = "FluxTransformer2DModel"
WORLD = 2
CPU = torch.device("cpu")


def measure(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """One rank; rank 0 prints the result."""
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    ours, theirs = (NetworkFile(str(folder / "flux"), None, CPU).network()[0] for _ in range(2))
    planned = Split(ours, PLANS[NETWORK], SequenceRanks((1.0,)), ThroughTorch)
    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, also on a CPU
        theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
    stock, _ = NetworkFile(str(folder / "flux"), None, CPU).network()

    generator = torch.Generator().manual_seed(0)
    rows, columns = 8, options.image // 8
    inputs = {
        "hidden_states": torch.randn(1, rows * columns, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, options.text, 64, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(*(torch.arange(n).float() for n in (1, rows, columns))),
        "txt_ids": torch.zeros(options.text, 3),
        "return_dict": False,
    }
    kernel = Sdpa()
    with open(folder / "memory", "a+b") as file:
        memory = CommonMemory(file.fileno(), rank, WORLD) if CommonMemory.supported() else None
    control = ControlPage.create()
    control.reset(WORLD)
    speeds = (1.0,) * WORLD
    with_memory, through_gloo = Ranks(speeds, CPU, kernel, memory), Ranks(speeds, CPU, kernel)

    def step(ranks: Ranks | None) -> None:
        if ranks is None:
            planned.ranks = SequenceRanks((1.0,))
        else:
            mesh = ranks.mesh(Degrees(ulysses=WORLD))
            planned.ranks = ranks.sequence(mesh, ParallelContext(ranks, mesh, control), kernel.name, "step")
        ours(**inputs)

    runs: dict[str, Callable[[], object]] = {
        "diffusers alone": partial(stock, **inputs),
        "diffusers context parallel": partial(theirs, **inputs),
        "this engine alone": partial(step, None),
        "this engine": partial(step, with_memory),
        "this engine through gloo": partial(step, through_gloo),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for number in range(options.rounds + 2):
            for name, run in runs.items():
                dist.barrier()
                if name.endswith("alone") and rank:
                    continue
                began = time.perf_counter()
                run()
                if number >= 2:
                    times[name].append(time.perf_counter() - began)
    mine = torch.tensor([[*times[name], *[0.0] * (options.rounds - len(times[name]))] for name in runs])
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    if rank == 0:
        ms = {name: 1000 * median(row.tolist()) for name, row in zip(runs, mine, strict=True)}
        layers = 2 * options.layers
        result = {"ms": {name: round(value, 2) for name, value in ms.items()}, "ms_per_layer_above_half": {}}
        for name in runs:
            if not name.endswith("alone"):
                alone = ms["diffusers alone" if name.startswith("diffusers") else "this engine alone"]
                result["ms_per_layer_above_half"][name] = round((ms[name] - alone / WORLD) / layers, 3)
        print(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--image", type=int, default=240, help="image tokens, a multiple of 16")
    parser.add_argument("--text", type=int, default=16, help="text tokens, even")
    parser.add_argument("--layers", type=int, default=8, help="dual-stream blocks, and as many single-stream blocks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options.rank, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        layers = {"num_layers": options.layers, "num_single_layers": options.layers}
        write_tiny(Path(folder) / "flux", NETWORK, **layers)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--rank", str(rank), "--folder", folder],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(WORLD)
        ]
        sys.exit(max(process.wait() for process in ranks))


if __name__ == "__main__":
    main()
