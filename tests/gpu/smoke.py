"""Two ranks exchange what the engine's ranks exchange: `python -m tests.gpu.smoke --devices shared|cuda|cpu`.

Each rank is `python -m tests.gpu.smoke RANK WORLD STORE RESULTS`. The last line is JSON: seconds by exchange, the
slowest rank's; `meet` is the process group's start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import devices
from tests.distributed.start_ranks import run_ranks

WORLD = 2


def uneven(rank: int, device: torch.device) -> None:
    """Rank i sends 3 i + j + 1 rows to rank j."""
    _all_to_all(rank, device, [[3 * i + j + 1 for j in range(WORLD)] for i in range(WORLD)])


def empty(rank: int, device: torch.device) -> None:
    """Rank 1 sends nothing, and rank 0 nothing to itself."""
    _all_to_all(rank, device, [[0, 5], [0, 0]])


def _all_to_all(rank: int, device: torch.device, rows: list[list[int]]) -> None:
    """`rows[i][j]` is how many rows rank i sends to rank j; their values are 100 i + j."""
    send = torch.cat([torch.full((n, 4), 100.0 * rank + j, device=device) for j, n in enumerate(rows[rank])])
    counts = [rows[i][rank] for i in range(WORLD)]
    received = torch.full((sum(counts), 4), -1.0, device=device)
    dist.all_to_all_single(received, send, counts, rows[rank])
    expected = torch.cat([torch.full((n, 4), 100.0 * i + rank, device=device) for i, n in enumerate(counts)])
    assert torch.equal(received, expected)


def all_reduce(rank: int, device: torch.device) -> None:
    x = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(x)
    assert torch.equal(x, torch.full_like(x, WORLD * (WORLD + 1) / 2))


def neighbours(rank: int, device: torch.device) -> None:
    """A hop of a ring, of unequal lengths."""
    right, left = (rank + 1) % WORLD, (rank - 1) % WORLD
    send, received = (torch.full((10 + r,), float(r), device=device) for r in (rank, left))
    received = torch.full_like(received, -1)
    hops = [dist.P2POp(dist.isend, send, right), dist.P2POp(dist.irecv, received, left)]
    for work in dist.batch_isend_irecv(hops):
        work.wait()
    assert torch.equal(received, torch.full_like(received, left))


EXCHANGES: tuple[Callable[[int, torch.device], None], ...] = (uneven, empty, all_reduce, neighbours)


def run_rank(rank: int, world: int, store: str, results: str) -> None:
    began = time.perf_counter()
    device = devices.meet(rank, world, store)
    dist.barrier()
    seconds = {"meet": time.perf_counter() - began}
    for exchange in EXCHANGES:
        began = time.perf_counter()
        exchange(rank, device)  # its comparison waits for the device
        seconds[exchange.__name__] = time.perf_counter() - began
    Path(results).write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", choices=list(devices.KINDS), default="shared")
    devices.choose(parser.parse_args().devices)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [json.loads(text) for text in run_ranks("tests.gpu.smoke", WORLD, Path(folder))]
    slowest = {name: round(max(rank[name] for rank in ranks), 3) for name in ranks[0]}
    for name, seconds in slowest.items():
        print(f"{name}: right, {seconds:.3f} s")
    print(json.dumps(slowest))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        run_rank(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
