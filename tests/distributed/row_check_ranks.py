"""One rank of the row check's tests: `python -m tests.distributed.row_check_ranks RANK WORLD STORE RESULTS MEMORY`.

Every case attends random tokens under one split. Right attentions must pass the check and wrong ones fail it, on all
ranks alike.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.between import StreamAttention
from parallel.attention.common_memory import CommonMemory
from parallel.attention.kernels import Sdpa
from parallel.attention.row_check import RowCheck, allowed_error, row_errors
from parallel.degrees import Degrees
from parallel.errors import UnsupportedError
from parallel.mesh import Mesh
from parallel.plan import AttentionPlan, shares
from parallel.worker.ranks import Ranks

HEAD_DIM = 64
LONG = 1500
"""Above one block of keys of the reference."""
BREAKS_FROM = 512
"""Keys from which `BrokenWhenLong` is wrong."""
WORLDS = (1, 2, 3, 4)
Attend = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention, right or with a fault."""

    weights: tuple[float, ...]
    ring: int = 1
    common: bool = False
    pipeline: int = 1
    heads: int = 4
    tokens: tuple[int, ...] = (211, 20)
    batch: int = 1
    dtype: str = "bfloat16"
    fault: str = ""
    between: str = ""
    """Of two streams, queries and keys: `unequal`, or with `grouped` heads, or `masked` besides; `blind`: some queries
    see no key."""

    @property
    def name(self) -> str:
        exchange = "memory" if self.common else "collective"
        speeds = ":".join(f"{weight:g}" for weight in self.weights)
        return (
            f"{self.fault or 'right'} speeds {speeds} ring {self.ring} {exchange} pipeline {self.pipeline} heads"
            f" {self.heads} tokens {'+'.join(map(str, self.tokens))} batch {self.batch} {self.dtype}"
            + (f" {self.between}" if self.between else "")
        )


_SPLITS: dict[int, list[tuple[tuple[float, ...], int]]] = {
    1: [((1.0,), 1)],
    2: [((1.0, 1.0), 1), ((3.0, 1.0), 2)],
    3: [((1.0, 2.0, 1.0), 1), ((1.0, 1.0, 1.0), 3)],
    4: [((1.0, 2.0, 1.0, 4.0), 1), ((1.0,) * 4, 4), ((1.0, 2.0, 1.0, 4.0), 2)],
}
_DTYPES = ("bfloat16", "float16", "float32")
_RIGHT = [
    *(Case(weights=w, ring=r, dtype=d) for s in _SPLITS.values() for (w, r), d in product(s, _DTYPES)),
    *(Case(weights=w, ring=r, common=True, batch=2) for s in _SPLITS.values() for w, r in s),
    *(Case(weights=w, ring=r, pipeline=2, heads=8) for s in _SPLITS.values() for w, r in s),
    *(Case(weights=w, ring=r, heads=1, tokens=(9, 0)) for s in _SPLITS.values() for w, r in s),
    *(Case(weights=w, ring=r, tokens=(LONG, 7)) for s in _SPLITS.values() for w, r in s),
]
_FAULTY = [
    Case(weights=w, ring=r, fault=fault, **options)
    for splits in _SPLITS.values()
    for (w, r), (fault, options) in product(
        splits,
        [
            ("rows shifted", {}),
            ("heads swapped", {}),
            ("2 % too large", {}),
            ("2 % too large", {"dtype": "float32"}),
            ("a NaN", {}),
            ("one rank's tokens", {"batch": 2}),
            ("keys lost", {}),
            ("broken when long", {"tokens": (2 * LONG, 7)}),
            ("softmax scale", {"dtype": "float32"}),
        ],
    )
]
_BETWEEN = [
    Case(weights=w, ring=r, tokens=(97, keys), between=between, dtype="float32", fault=fault)
    for splits in _SPLITS.values()
    for w, r in splits
    for between, keys, fault in [
        ("unequal", 41, ""),
        ("unequal", 2, ""),  # of which some ranks have none
        ("grouped", 41, ""),
        ("masked", 1100, ""),
        ("blind", 41, ""),
        ("blind", 41, "rows shifted"),
        ("masked", 41, "rows shifted"),
        ("unequal", 41, "keys lost"),
    ]
]
"""`tokens` are queries and keys."""
CASES = [*_RIGHT, *_FAULTY, *_BETWEEN]


@dataclass(frozen=True)
class Result:
    """What one rank saw in one case."""

    case: str
    rank: int
    error: float
    """Largest of this rank's `row_errors`."""
    allowed: float
    message: str
    """Of the check, if it failed."""
    passed: int
    """Kinds reported as passed in two calls, the second of which needs no check."""
    collectives: tuple[int, int]
    """All-reduces in the first and in the second call."""


class _Faulty(Sdpa):
    """A kernel with a fault inside: before the results travel back."""

    def __init__(self, fault: str):
        super().__init__()
        self._fault = fault

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.inputs(q, k, v)
        return super().with_lse(q, k, v, None if mask is None else mask[..., : k.shape[2]])

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = k.shape[2]
        if self._fault == "keys lost":
            return q, k[:, :, : keys - keys // 8], v[:, :, : keys - keys // 8]
        if self._fault == "softmax scale":
            return q * 1.02, k, v
        if self._fault == "broken when long" and keys > BREAKS_FROM:
            return q, k, torch.cat((v[:, :, :BREAKS_FROM], v[:, :, BREAKS_FROM:].flip(2)), dim=2)
        return q, k, v


def _a_nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, -1, 0, 3] = torch.nan
    return out


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows shifted": lambda out: out.roll(1, dims=2),
    "heads swapped": lambda out: out[:, [1, 0, *range(2, out.shape[1])]],
    "2 % too large": lambda out: out * 1.02,
    "a NaN": _a_nan,
    "one rank's tokens": lambda out: -out if dist.get_rank() == dist.get_world_size() - 1 else out,
}


def made(
    case: Case, rank: int, ranks: Ranks, mesh: Mesh, check: RowCheck
) -> tuple[AttentionPlan, Attend, Attend, list[Tensor], Tensor | None]:
    """A plan, its attention, the same checked, q, k and v of this rank, and the mask."""
    groups = case.heads // 2 if case.between == "grouped" else case.heads
    if case.between:
        queries, keys = (shares(total, case.weights) for total in case.tokens)
    else:
        queries = keys = shares(sum(case.tokens), case.weights, minimum=1)
    plan = AttentionPlan(queries, keys, case.heads, groups, case.weights, case.ring)
    generator = torch.Generator().manual_seed(0)

    def random(tokens: tuple[int, ...], heads: int) -> Tensor:
        """This rank's tokens of a stream, [B, heads, S_r, D]."""
        whole = torch.randn(case.batch, heads, sum(tokens), HEAD_DIM, generator=generator)
        return whole.split(tokens, dim=2)[rank].to(getattr(torch, case.dtype))

    inputs = [random(queries, case.heads), random(keys, groups), random(keys, groups)]
    mask = None
    if case.between == "masked":  # the last two thirds of the keys, so that whole chunks of a ring are
        mask = (torch.arange(sum(keys)) < sum(keys) // 3).expand(1, 1, sum(queries), -1)
    if case.between == "blind":
        mask = (torch.arange(sum(queries)) % 2 == 0)[:, None].expand(1, 1, -1, sum(keys))
    kernel = _Faulty(case.fault)

    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = kernel.inputs(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    change = _CHANGES.get(case.fault, lambda out: out)

    class Changed(StreamAttention):
        def _attend(self, *args: Any) -> Tensor:
            return change(super()._attend(*args))

    def attend(check: RowCheck | None) -> Attend:
        common = ranks.common(mesh) if case.common else None
        attention = Changed(
            plan, rank, mesh.ulysses, mesh.ring, kernel, pipeline=case.pipeline, common=common, check=check
        )
        return lambda *qkv: attention(*qkv, compute, mask)

    return plan, attend(None), attend(check), inputs, mask


def run_case(case: Case, rank: int, ranks: Ranks) -> Result:
    mesh = ranks.mesh(Degrees(ring=case.ring, ulysses=len(case.weights) // case.ring))
    known: set[object] = set()
    reports: list[object] = []

    def passed(kind: object) -> None:
        known.add(kind)
        reports.append(kind)

    check = RowCheck(mesh, "sdpa", known.__contains__, passed)
    plan, attention, checked, inputs, mask = made(case, rank, ranks, mesh, check)
    counts, message = [], ""
    for _ in range(2):
        with _CountReductions() as counter:
            try:
                out = checked(*inputs)
            except UnsupportedError as error:
                message, out = str(error), attention(*inputs)
        counts.append(counter.count)
    errors, _ = row_errors(*inputs, out, plan, mesh, mask)
    return Result(
        case=case.name,
        rank=rank,
        error=float(errors.max()) if errors.numel() else 0.0,
        allowed=allowed_error("sdpa", inputs[0].dtype, ranks.device),
        message=message,
        passed=len(reports),
        collectives=(counts[0], counts[1]),
    )


class _CountReductions:
    """Counts all-reduces while it is entered."""

    count = 0

    def __enter__(self) -> _CountReductions:
        self._original = dist.all_reduce

        def counted(*args: object, **kwargs: object) -> object:
            self.count += 1
            return self._original(*args, **kwargs)  # type: ignore[arg-type]

        dist.all_reduce = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def main(rank: int, world: int, store: str, results: str, memory: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)
    file = os.open(memory, os.O_RDWR | os.O_CREAT)
    usable = CommonMemory.supported()
    device = torch.device("cpu")
    ranks = Ranks((1.0,) * world, device, Sdpa(), CommonMemory(file, rank, world) if usable else None)
    with torch.no_grad():
        found = [run_case(case, rank, ranks) for case in CASES if len(case.weights) == world]
    Path(results).write_text(json.dumps([asdict(result) for result in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
