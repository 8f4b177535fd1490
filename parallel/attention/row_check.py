"""Compares a joint attention with an exact reference on sampled rows, at the length at which it runs.

The self-check of a family runs a small step, so it meets neither chunks of heads in flight nor a kernel's path for long
sequences nor offsets above 2^31. Here the first real attention of each kind is checked where it happens. The reference
uses neither the exchange nor the kernel: every rank gets the sampled rows of q by an all-reduce, attends them in fp64
to the keys it owns, and the partial softmax sums are merged over the ranks by their maximum:

    q rows [B, H, n, D] → over own keys: m [B, H, n], Σ p, Σ p·v, Σ p²·v²  → all-reduce max of m, sum of the rest

Cost: n rows of attention in fp64 (n = 8 + 2 per rank), a few tens of MB, four small all-reduces and one host
synchronization; once per kind of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedError
from ..mesh import Mesh
from ..plan import SequencePlan
from .joint import JointAttention

T = TypeVar("T")
Kind = tuple[object, ...]
"""Of attention: all that selects code in the exchange or the kernel. The same on all ranks of a sequence."""

_SPREAD = 8
"""Sampled rows that are spread over the whole sequence, besides the first and last row of each rank."""
_KEYS_AT_ONCE = 1024
"""Keys per block of the reference: 25 MB each for k and v of 24 heads of 128 channels in fp64."""
_ALLOWED = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 1e-4}
_ALLOWED_TF32 = 2.0**-6
_ALLOWED_8_BIT = 0.3
_TINY = 1e-30


def allowed_error(kernel: str, dtype: torch.dtype, device: torch.device) -> float:
    """Largest error of a row, see `row_errors`, that rounding explains.

    Exact kernels round the probabilities to the dtype before they multiply by v, and the result once; a ring also
    rounds each chunk's result. Each of these contributes at most one unit roundoff u to the error (u = 2^-8 in
    bfloat16, 2^-11 in float16; scores and sums are fp32). Four of them are allowed in bfloat16, and eight in float16,
    whose probabilities underflow below 6e-8 of the row's largest. In practice 0.6 u is seen. In fp32 the scores' own
    rounding dominates, |score| · sqrt(D) · 2^-24; with TF32 products u is 2^-11, again multiplied by the score.
    `sage` quantizes q, k and P to 8 bits; what it is allowed is an estimate, which lets a wrong exchange through as
    little as the others do (that makes errors near 1), but not a few percent.
    """
    if kernel == "sage":
        return _ALLOWED_8_BIT
    if dtype == torch.float32 and device.type == "cuda" and _tf32():
        return _ALLOWED_TF32
    return _ALLOWED[dtype]


def sampled_rows(plan: SequencePlan) -> list[int]:
    """Tokens of the joint sequence whose attention is compared: each rank's first and last one, and some in between."""
    total = sum(plan.streams)
    edges = {token for start, stop in plan.token_ranges for token in (start, stop - 1)}
    return sorted(edges | {i * (total - 1) // (_SPREAD - 1) for i in range(_SPREAD)})


class CheckedAttention:
    """A `JointAttention` whose next call is checked, then reported as `passed`; to be dropped after that.

    Collective over the ranks of the sequence: all of them must check the same call.

    Args:
        attention: what is checked.
        plan, mesh: its split.
        kernel: name of its kernel.
        passed: called with the kind of each attention that passed, on all ranks of the sequence alike.
        is_known: whether a kind needs no check; the same answer on all ranks of the sequence.

    Raises:
        UnsupportedError: a row differs by more than `allowed_error`, or is not finite though the inputs are; raised by
            the call, on all ranks of the sequence alike.
    """

    def __init__(
        self,
        attention: JointAttention,
        plan: SequencePlan,
        mesh: Mesh,
        kernel: str,
        is_known: Callable[[Kind], bool],
        passed: Callable[[Kind], None],
    ):
        self._attention = attention
        self._plan, self._mesh, self._kernel = plan, mesh, kernel
        self._is_known, self._passed = is_known, passed

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._checked(q, k, v, self._attention(q, k, v))

    def with_work(self, q: Tensor, k: Tensor, v: Tensor, work: Callable[[], T]) -> tuple[Tensor, T]:
        out, result = self._attention.with_work(q, k, v, work)
        return self._checked(q, k, v, out), result

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        finish = self._attention.start(q, k, v)
        return lambda: self._checked(q, k, v, finish())

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        self._check(q.detach(), k.detach(), v.detach(), out.detach())
        return out

    @torch.no_grad()
    def _check(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        kind = (self._plan, self._mesh.degrees, q.shape[0], q.shape[3], q.dtype)
        if self._is_known(kind):
            return
        allowed = allowed_error(self._kernel, q.dtype, q.device)
        errors, finite = row_errors(q, k, v, out, self._plan, self._mesh)
        worst = errors.max() if errors.numel() else q.new_zeros((), dtype=torch.float64)
        verdict = torch.stack((worst.nan_to_num(nan=torch.inf), (~finite).to(worst)))
        self._mesh.reduce(verdict, dist.ReduceOp.MAX)
        error, unusable = verdict.tolist()
        if unusable:  # a model that overflows does so on one device, too; a later step may be checked
            return
        if not error <= allowed:
            raise UnsupportedError(self._complaint(q, error, allowed))
        self._passed(kind)

    def _complaint(self, q: Tensor, error: float, allowed: float) -> str:
        degrees = self._mesh.degrees
        choices = [] if self._kernel == "sdpa" else ["attention sdpa"]
        choices += ["ulysses_degree 1"] * (degrees.ulysses > 1) + ["ring_degree 1"] * (degrees.ring > 1)
        return (
            f"attention {self._kernel!r} failed its check at {sum(self._plan.streams)} tokens"
            f" ({self._plan.heads} heads of {q.shape[3]} channels in {str(q.dtype).removeprefix('torch.')}, split as"
            f" {degrees}): sampled rows differ by {error:.2g} (relative; allowed {allowed:.2g}) from exact attention."
            f" Use {' or '.join(choices) or 'another size'}, and please report this with your GPU and your version of"
            f" torch ({torch.__version__})."
        )


def row_errors(q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: SequencePlan, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Compares sampled rows of an attention with their exact values. Collective over the ranks of the sequence.

    Args:
        q, k, v, out: this rank's tokens with all heads, [B, S_r, H, D].

    Returns:
        ‖out − exact‖ / max(‖exact‖, ‖noise‖) of each sampled row of this rank, [B, H, rows], norms over the channels.
        The noise is that of probabilities with independent relative errors of 1, sqrt(Σ p²·v²): where large values
        cancel it exceeds the result. And whether all exact rows are finite.
    """
    rows = sampled_rows(plan)
    start, stop = plan.token_ranges[mesh.sp_rank]
    own = [i for i, row in enumerate(rows) if start <= row < stop]
    local = torch.tensor([rows[i] - start for i in own], device=q.device)
    batch, _, heads, dim = q.shape
    queries = torch.zeros(batch, heads, len(rows), dim, dtype=torch.float64, device=q.device)
    queries[:, :, own] = q[:, local].double().transpose(1, 2)
    mesh.reduce(queries, dist.ReduceOp.SUM)  # exact: one rank alone adds to each row
    exact, noise = _reference(queries * dim**-0.5, k, v, mesh)
    finite = exact.isfinite().all()
    exact, noise = exact[:, :, own], noise[:, :, own]
    difference = (out[:, local].double().transpose(1, 2) - exact).norm(dim=-1)
    return difference / torch.maximum(exact.norm(dim=-1), noise.norm(dim=-1)).clamp_min(_TINY), finite


def _reference(queries: Tensor, k: Tensor, v: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries [B, H, n, D] to the keys of all ranks, and its noise, see `row_errors`."""
    shape = queries.shape
    largest = queries.new_full(shape[:-1], -torch.inf)
    sums = queries.new_zeros(*shape[:-1], 1 + 2 * shape[-1])  # Σ p, Σ p·v, Σ p²·v²
    for keys, values in zip(k.split(_KEYS_AT_ONCE, dim=1), v.split(_KEYS_AT_ONCE, dim=1), strict=True):
        scores = queries @ keys.double().permute(0, 2, 3, 1)
        values = values.double().transpose(1, 2)
        new = torch.maximum(largest, scores.amax(-1))
        _rescale(sums, largest, new)
        p = (scores - new[..., None]).exp_()
        sums += torch.cat((p.sum(-1, keepdim=True), p @ values, p.square() @ values.square()), dim=-1)
        largest = new
    own = largest.clone()
    mesh.reduce(largest, dist.ReduceOp.MAX)
    _rescale(sums, own, largest)
    mesh.reduce(sums, dist.ReduceOp.SUM)
    total, weighted, squares = sums.split((1, shape[-1], shape[-1]), dim=-1)
    return weighted / total, squares.sqrt() / total


def _rescale(sums: Tensor, before: Tensor, after: Tensor) -> None:
    """Makes sums relative to the maximum `before` relative to `after`."""
    factor = (before - after).exp_()[..., None]
    dim = (sums.shape[-1] - 1) // 2
    sums[..., : 1 + dim] *= factor
    sums[..., 1 + dim :] *= factor.square()


def _tf32() -> bool:
    """Whether fp32 products may be computed in TF32 on CUDA, by either of torch's ways to say so."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return precision == "tf32" if precision is not None else bool(torch.backends.cuda.matmul.allow_tf32)
