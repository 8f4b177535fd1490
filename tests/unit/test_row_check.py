"""The check of attention at its real length, in one process: kinds, tolerances, overflow."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.between import StreamAttention
from parallel.attention.kernels import Sdpa
from parallel.attention.row_check import Kind, RowCheck, allowed_error, sampled_rows
from parallel.degrees import Degrees
from parallel.errors import UnsupportedError
from parallel.mesh import Mesh
from parallel.plan import AttentionPlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MESH = Mesh(Degrees(), 0, None, None)


class Checked:
    """Attention of one rank, times a factor, with its check."""

    def __init__(self, factor: float = 1.0):
        self.known: set[Kind] = set()
        self._factor = factor
        self._check = RowCheck(MESH, "sdpa", self.known.__contains__, self.known.add)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        plan = AttentionPlan((q.shape[2],), (k.shape[2],), 3, 3, (1.0,))
        return StreamAttention(plan, 0, None, None, Sdpa(), check=self._check)(q, k, v, self._compute, mask)

    def _compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._factor * F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def tensors(batch: int = 1, dtype: torch.dtype = torch.bfloat16, dim: int = 16, tokens: int = 45) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, batch, 3, tokens, dim, generator=generator).to(dtype))


def test_each_kind_is_checked_once():
    attend = Checked()
    mask = torch.ones(45, 45, dtype=torch.bool)
    kinds = [{}, {"batch": 2}, {"dtype": torch.float32}, {"dim": 32}, {"tokens": 44}]
    calls = [(*tensors(**options), None) for options in kinds] + [(*tensors(), mask)]
    for number, call in enumerate(calls, start=1):
        for _ in range(2):
            attend(*call)
            assert len(attend.known) == number


@pytest.mark.parametrize("mask", [None, torch.ones(45, 45, dtype=torch.bool)], ids=["plain", "masked"])
def test_a_wrong_attention_is_refused_each_time(mask: Tensor | None):
    attend = Checked(2.0)
    for _ in range(2):  # a refused kind is not taken for a checked one
        with pytest.raises(UnsupportedError, match=r"'sdpa' failed its check at 45 tokens .*Use another size"):
            attend(*tensors(), mask)
    assert not attend.known


def test_inputs_that_are_not_finite_pass_unchecked():
    """A model that overflows does so on one device, too."""
    attend, (q, k, v) = Checked(), tensors()
    k[0, 1, 7, 3] = torch.inf
    attend(q, k, v)
    assert not attend.known
    attend(*tensors())
    assert attend.known


def test_rows_without_a_value_are_equal():
    """Values of zero, and queries that see no key, to which kernels give whatever they like."""
    attend, (q, k, v) = Checked(), tensors()
    attend(q, k, torch.zeros_like(v))
    attend(q, k, v, (torch.arange(45) % 2 == 0)[:, None].expand(45, 45))
    assert len(attend.known) == 2


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 1.0), (1.0,) * 8])
def test_sampled_rows_reach_the_edges_of_every_share(weights: tuple[float, ...]):
    plan = AttentionPlan.of_sequence(70_256, 24, weights)
    rows = sampled_rows(plan.token_ranges)
    assert rows == sorted(set(rows)) and len(rows) <= 8 + 2 * len(weights)
    assert {token for start, stop in plan.token_ranges for token in (start, stop - 1)} <= set(rows)
    gaps = [b - a for a, b in itertools.pairwise(rows)]
    assert max(gaps) <= 70_256 / 7 + 1


def test_as_many_rows_as_there_are_tokens_at_most():
    assert sampled_rows(AttentionPlan.of_sequence(3, 1, (1.0, 1.0)).token_ranges) == [0, 1, 2]


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
