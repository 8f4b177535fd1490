"""One rank of the attention tests, started as `python -m tests.distributed.attention_ranks RANK WORLD STORE RESULTS`.

Four processes meet once; each case runs on the first `world` of them. Every rank compares its own tokens with attention
over the whole sequence on one device, and counts what it sent.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.joint import joint_attention
from parallel.attention.kernels import Sdpa
from parallel.attention.traffic import Traffic
from parallel.plan import AttentionPlan
from tests.distributed.devices import meet

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
    ring: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        return len(self.weights)

    @property
    def name(self) -> str:
        speeds = ":".join(f"{weight:g}" for weight in self.weights)
        degrees = f"ulysses {self.world // self.ring} ring {self.ring} pipeline {self.pipeline}"
        return f"{degrees} speeds {speeds} heads {self.heads} tokens {self.video}+{self.text} batch {self.batch}"

    @property
    def plan(self) -> AttentionPlan:
        return AttentionPlan.of_sequence(self.video + self.text, self.heads, self.weights, self.ring)


_ULYSSES = [(1.0,), (1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0,) * 4, (1.0, 2.0, 1.0, 4.0)]
_TOKENS = [(24, 8), (24, 0), (23, 5), (9, 1), (7, 2), (4, 8)]
_RINGS = [((1.0, 1.0), 2), ((3.0, 1.0, 1.0), 3), ((1.0,) * 4, 4), ((1.0,) * 4, 2), ((1.0, 2.0, 1.0, 4.0), 2)]
_PIPELINED = [((1.0, 1.0), 1), ((3.0, 1.0, 1.0), 1), ((1.0, 2.0, 1.0, 1.0), 2)]
CASES = [
    *(Case(w, heads, *t, batch) for w, heads, t, batch in product(_ULYSSES, (1, 3, 4, 5), _TOKENS, (1, 2))),
    *(Case(w, heads, *t, batch, ring) for (w, ring), heads, t, batch in product(_RINGS, (1, 3, 4), _TOKENS, (1, 2))),
    *(Case(w, 8, *t, 2, ring, pipeline=3) for (w, ring), t in product(_PIPELINED, _TOKENS)),
]


@dataclass(frozen=True)
class Result:
    """What one rank saw in one case."""

    case: str
    rank: int
    error: float
    """max |a − b| over this rank's tokens."""
    gradient_error: float | None
    """The same of the gradients of q, k and v; None of a ring on CUDA, which has none."""
    shape: tuple[int, ...]
    collectives: list[str]
    bytes_to_others: int
    least: int
    """Elements that the rank sent or received in an all-to-all, the fewest."""
    reported: tuple[int, int]
    """Collectives and bytes as the engine counts them itself."""


_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


class Spy:
    """Counts the calls of `torch.distributed`, and the bytes that they send to other ranks.

    Args:
        position: this rank's place in its Ulysses group.
    """

    def __init__(self, position: int):
        self._position = position
        self.collectives: list[str] = []
        self.bytes_to_others = 0
        self.least = sys.maxsize

    @contextmanager
    def watch(self) -> Iterator[None]:
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
                _, send, received, sizes = args
                self.least = min(self.least, sum(sizes), sum(received))
                self.bytes_to_others += (sum(sizes) - sizes[self._position]) * send.element_size()
            elif name == "batch_isend_irecv":
                self.bytes_to_others += sum(op.tensor.nbytes for op in args[0] if op.op is dist.isend)
            return original(*args, **kwargs)

        return call


class Groups:
    """The process groups of a mesh of the first `world` ranks."""

    def __init__(self, world: int, ring: int):
        width = world // ring
        timeout = datetime.timedelta(seconds=60)
        self._rows = [dist.new_group([*range(r * width, (r + 1) * width)], timeout=timeout) for r in range(ring)]
        self._columns = [dist.new_group([*range(c, world, width)], timeout=timeout) for c in range(width)]

    def of(self, rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Ulysses, ring."""
        return self._rows[rank // len(self._columns)], self._columns[rank % len(self._columns)]


def run_case(case: Case, rank: int, groups: Groups, device: torch.device) -> Result:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.video + case.text, case.heads, HEAD_DIM)
    q, k, v, direction = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    mine = slice(*case.plan.token_ranges[rank])
    traffic, spy = Traffic(on_cuda=device.type == "cuda"), Spy(rank % (case.world // case.ring))
    attention = joint_attention(case.plan, rank, *groups.of(rank), Sdpa(), case.pipeline, traffic)
    with torch.no_grad(), spy.watch():
        out = attention(q[:, mine], k[:, mine], v[:, mine])
    reported = (traffic.collectives, traffic.bytes_sent)

    whole_inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in whole_inputs)).transpose(1, 2)
    gradient_error = None
    if case.ring == 1 or device.type == "cpu":
        expected = [grad[:, mine] for grad in torch.autograd.grad((whole * direction).sum(), whole_inputs)]
        local = [x.detach()[:, mine].clone().requires_grad_() for x in (q, k, v)]
        gradients = torch.autograd.grad((attention(*local) * direction[:, mine]).sum(), local)
        gradient_error = max(_error(a, b) for a, b in zip(gradients, expected, strict=True))
    return Result(
        case=case.name,
        rank=rank,
        error=_error(out, whole[:, mine]),
        gradient_error=gradient_error,
        shape=tuple(out.shape),
        collectives=spy.collectives,
        bytes_to_others=spy.bytes_to_others,
        least=spy.least,
        reported=reported,
    )


def _error(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def main(rank: int, world: int, store: str, results: str) -> None:
    device = meet(rank, world, store)
    groups = {shape: Groups(*shape) for shape in sorted({(case.world, case.ring) for case in CASES})}
    mine = [run_case(case, rank, groups[case.world, case.ring], device) for case in CASES if rank < case.world]
    Path(results).write_text(json.dumps([asdict(result) for result in mine]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
