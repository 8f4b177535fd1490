"""The check of attention at its real length, in one process: kinds, tolerances, overflow, compiled blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from parallel.attention.joint import Unexchanged
from parallel.attention.kernels import Sdpa
from parallel.attention.row_check import CheckedAttention, Kind, RowCheck, allowed_error, sampled_rows
from parallel.degrees import Degrees
from parallel.errors import UnsupportedError
from parallel.mesh import Mesh
from parallel.plan import SequencePlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PLAN = SequencePlan((40, 5), 3, (1.0,))
MESH = Mesh(Degrees(), 0, None, None)


class Doubled(Unexchanged):
    def __init__(self) -> None:
        super().__init__(Sdpa())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * super().__call__(q, k, v)


def checked(attention: Unexchanged, known: set[Kind]) -> CheckedAttention:
    return CheckedAttention(attention, PLAN, RowCheck(MESH, "sdpa", known.__contains__, known.add))


def tensors(batch: int = 1, dtype: torch.dtype = torch.bfloat16, dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, batch, 45, 3, dim, generator=generator).to(dtype))


def test_each_kind_is_checked_once():
    known: set[Kind] = set()
    attend = checked(Unexchanged(Sdpa()), known)
    for number, options in enumerate([{}, {"batch": 2}, {"dtype": torch.float32}, {"dim": 32}], start=1):
        for _ in range(2):
            attend(*tensors(**options))
            assert len(known) == number


@pytest.mark.parametrize("way", ["call", "with work", "start"])
def test_a_wrong_attention_is_refused_however_it_is_called(way: str):
    known: set[Kind] = set()
    attend = checked(Doubled(), known)
    ways = {
        "call": lambda: attend(*tensors()),
        "with work": lambda: attend.with_work(*tensors(), lambda: None),
        "start": lambda: attend.start(*tensors())(),
    }
    for _ in range(2):  # a refused kind is not taken for a checked one
        with pytest.raises(UnsupportedError, match=r"'sdpa' failed its check at 45 tokens .*Use another size"):
            ways[way]()
    assert not known


def test_inputs_that_are_not_finite_pass_unchecked():
    """A model that overflows does so on one device, too."""
    known: set[Kind] = set()
    attend, (q, k, v) = checked(Unexchanged(Sdpa()), known), tensors()
    k[0, 7, 1, 3] = torch.inf
    attend(q, k, v)
    assert not known
    attend(*tensors())
    assert known


def test_rows_without_a_value_are_equal():
    attend, (q, k, v) = checked(Unexchanged(Sdpa()), known := set()), tensors()
    attend(q, k, v.zero_())
    assert known


def test_the_check_runs_inside_compiled_blocks():
    from parallel.attention.in_graph import InGraph, standing_for

    def block(x: Tensor, attend: InGraph) -> Tensor:
        return attend(x + 1, x, x - 1).relu()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, known = tensors()[0], set[Kind]()
    with standing_for([checked(Unexchanged(Sdpa()), known)]):
        compiled(x, InGraph(0))
    assert len(known) == 1
    with standing_for([checked(Doubled(), set())]), pytest.raises(UnsupportedError, match="failed its check"):
        compiled(x, InGraph(0))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 1.0), (1.0,) * 8])
def test_sampled_rows_reach_the_edges_of_every_share(weights: tuple[float, ...]):
    plan = SequencePlan((70_000, 256), 24, weights)
    rows = sampled_rows(plan.token_ranges)
    assert rows == sorted(set(rows)) and len(rows) <= 8 + 2 * len(weights)
    assert {token for start, stop in plan.token_ranges for token in (start, stop - 1)} <= set(rows)
    gaps = [b - a for a, b in itertools.pairwise(rows)]
    assert max(gaps) <= 70_256 / 7 + 1


def test_as_many_rows_as_there_are_tokens_at_most():
    assert sampled_rows(SequencePlan((3, 0), 1, (1.0, 1.0)).token_ranges) == [0, 1, 2]


def test_tolerances_follow_what_computes():
    before = torch.backends.cuda.matmul.allow_tf32
    assert allowed_error("flash", torch.bfloat16, CUDA) == 4 * 2.0**-8
    assert allowed_error("flash", torch.float16, CUDA) == 8 * 2.0**-11
    assert allowed_error("sage", torch.float16, CUDA) == 0.3
    try:
        for tf32, allowed in ((False, 1e-4), (True, 2.0**-6)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            assert allowed_error("sdpa", torch.float32, CUDA) == allowed
            assert allowed_error("sdpa", torch.float32, CPU) == 1e-4
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
