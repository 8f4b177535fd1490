"""One rank of the attention tests, started as `python -m tests.distributed.attention_ranks RANK STORE RESULTS`.

Four processes meet once; each case runs on the first `world` of them. Every rank compares its own tokens with attention
over the whole sequence on one device, and counts what it sent.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.kernels import select
from parallel.attention.ulysses import UlyssesAttention
from parallel.plan import SequencePlan

HEAD_DIM = 16
PROCESSES = 4


@dataclass(frozen=True)
class Case:
    """One joint attention."""

    weights: tuple[float, ...]
    """One per rank."""
    heads: int
    video: int
    text: int
    batch: int

    @property
    def world(self) -> int:
        return len(self.weights)

    @property
    def name(self) -> str:
        speeds = ":".join(f"{weight:g}" for weight in self.weights)
        return f"speeds {speeds} heads {self.heads} tokens {self.video}+{self.text} batch {self.batch}"

    @property
    def plan(self) -> SequencePlan:
        return SequencePlan((self.video, self.text), self.heads, self.weights)


_WEIGHTS = [(1,), (1, 1), (2, 1), (1, 1, 1), (3, 1, 1), (1, 1, 1, 1), (1, 2, 1, 4)]
_TOKENS = [(24, 8), (24, 0), (23, 5), (9, 1), (7, 2), (4, 8)]
CASES = [
    Case(tuple(map(float, weights)), heads, video, text, batch)
    for weights, heads, (video, text), batch in itertools.product(_WEIGHTS, (1, 3, 4, 5), _TOKENS, (1, 2))
]


@dataclass(frozen=True)
class Result:
    """What one rank saw in one case."""

    case: str
    rank: int
    error: float
    """max |a − b| over this rank's tokens."""
    shape: tuple[int, ...]
    collectives: list[str]
    bytes_to_others: int


_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "irecv", "isend", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


class Traffic:
    """Counts the calls of `torch.distributed`, and the bytes of `all_to_all_single`."""

    def __init__(self, rank: int):
        self._rank = rank
        self.collectives: list[str] = []
        self.bytes_to_others = 0

    @contextmanager
    def count(self) -> Iterator[None]:
        originals = {name: getattr(dist, name) for name in _COLLECTIVES}
        try:
            for name in _COLLECTIVES:
                setattr(dist, name, self._counted(name, originals[name]))
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.collectives.append(name)
            if name == "all_to_all_single":
                _, send, _, sizes = args
                self.bytes_to_others += (sum(sizes) - sizes[self._rank]) * send.element_size()
            return original(*args, **kwargs)

        return call


def run_case(case: Case, rank: int, group: dist.ProcessGroup) -> Result:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.video + case.text, case.heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    mine = slice(*case.plan.token_ranges[rank])
    attention = UlyssesAttention(case.plan, rank, group, select("sdpa", torch.device("cpu")))
    traffic = Traffic(rank)
    with traffic.count():
        out: Tensor = attention(q[:, mine], k[:, mine], v[:, mine])
    error = (out - whole[:, mine]).abs().max().item()
    return Result(case.name, rank, error, tuple(out.shape), traffic.collectives, traffic.bytes_to_others)


def main(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, PROCESSES), rank=rank, world_size=PROCESSES, timeout=timeout
    )
    groups = {world: dist.new_group(list(range(world)), timeout=timeout) for world in range(1, PROCESSES + 1)}
    mine = [run_case(case, rank, groups[case.world]) for case in CASES if rank < case.world]
    Path(results).write_text(json.dumps([asdict(result) for result in mine]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
