"""Compares distributed attention with an exact reference on sampled rows, at the sequence length at which it runs.

Small tests exercise neither pipelined chunks of heads nor a kernel's path for long sequences nor offsets above 2^31.
The first real attention of each kind is therefore checked in place. The reference uses neither the exchange nor the
kernel: every rank gets the sampled rows of q by an all-reduce and attends them in fp64 to the keys that it owns; the
partial softmax sums are then merged over the ranks, relative to the largest score:

    q rows [B, H, n, D] → over own keys: m [B, H, n], Σ p, Σ p·v, Σ p²·v²  → all-reduce max of m, sum of the rest

Cost: n rows of attention in fp64 (n = 8 + 2 per rank), a few tens of MB, four small all-reduces and one host
synchronisation; once per kind of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedError
from ..mesh import Mesh
from ..plan import AttentionPlan, Range

T = TypeVar("T")
Kind = tuple[object, ...]
"""Kind of attention: everything that selects code in the exchange or the kernel. The same on all ranks of a
sequence."""

_SPREAD = 8
"""Number of sampled rows spread over the whole sequence, besides the first and last row of each rank."""
_KEYS_AT_ONCE = 1024
"""Keys per block of the reference: 25 MB each for k and v of 24 heads of 128 channels in fp64."""
_ALLOWED = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 1e-4}
_ALLOWED_TF32 = 2.0**-6
_ALLOWED_8_BIT = 0.3
_TINY = 1e-30
_LOWEST = -1e30
"""Score of a masked key: finite, and its exponential is zero relative to that of any unmasked score."""


def allowed_error(kernel: str, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the largest error of a row, see `row_errors`, that rounding can explain.

    Exact kernels round the probabilities to the dtype before they multiply by v, and the result once; a ring also
    rounds each chunk's result. Each of these contributes at most one unit roundoff u to the error (u = 2^-8 in
    bfloat16, 2^-11 in float16; scores and sums are fp32). Four of them are allowed in bfloat16, and eight in float16,
    whose probabilities underflow below 6e-8 of the row's largest. In practice 0.6 u is seen. In fp32 the scores'
    own rounding dominates, |score| · sqrt(D) · 2^-24; with TF32 products u is 2^-11, again multiplied by the score.
    `sage` quantises q, k and P to 8 bits; its limit is an estimate that detects a wrong exchange (errors near 1) like
    the other limits, but tolerates errors of a few percent.
    """
    if kernel == "sage":
        return _ALLOWED_8_BIT
    if dtype == torch.float32 and device.type == "cuda" and _tf32():
        return _ALLOWED_TF32
    return _ALLOWED[dtype]


def sampled_rows(tokens: Sequence[Range]) -> list[int]:
    """Returns the queries whose attention is compared: each rank's first and last one, and some in between.

    Args:
        tokens: range of each rank's tokens, in sequence order; a rank may have none.
    """
    total = tokens[-1][1]
    edges = {token for start, stop in tokens for token in (start, stop - 1) if start < stop}
    return sorted(edges | {i * (total - 1) // (_SPREAD - 1) for i in range(_SPREAD)})


class RowCheck:
    """Check of the first attention of each kind. Collective over the ranks of a sequence: all must check the same one.

    Args:
        mesh: mesh whose ranks share the sequence.
        kernel: name of the kernel.
        is_known: returns True if a kind needs no check; the same answer on all ranks of the sequence.
        passed: called with the kind of each attention that passed, on all ranks of the sequence alike.
    """

    def __init__(self, mesh: Mesh, kernel: str, is_known: Callable[[Kind], bool], passed: Callable[[Kind], None]):
        self._mesh, self._kernel = mesh, kernel
        self._is_known, self._passed = is_known, passed

    @torch.no_grad()
    def __call__(
        self,
        plan: AttentionPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Checks `out`, the attention of this rank's queries [B, H, Q_r, D] to the keys of all ranks; k and v
        [B, G, K_r, D] are this rank's share of these.

        Args:
            mask: mask of the whole attention, see `row_errors`.

        Raises:
            UnsupportedError: a row differs by more than `allowed_error`, or is not finite although the exact rows are;
                raised on all ranks of the sequence alike.
        """
        kind = (plan, self._mesh.degrees, q.shape[0], q.shape[3], q.dtype, mask is None)
        if self._is_known(kind):
            return
        allowed = allowed_error(self._kernel, q.dtype, q.device)
        q, k, v, out = (x.detach() for x in (q, k, v, out))
        errors, finite = row_errors(q, k, v, out, plan, self._mesh, mask)
        worst = errors.max() if errors.numel() else q.new_zeros((), dtype=torch.float64)
        verdict = torch.stack((worst.nan_to_num(nan=torch.inf), (~finite).to(worst)))
        self._mesh.reduce(verdict, dist.ReduceOp.MAX)
        error, unusable = verdict.tolist()
        if unusable:  # a model that overflows does so on a single device too; a later step may be checked
            return
        if not error <= allowed:
            raise UnsupportedError(self._complaint(plan, q, error, allowed))
        self._passed(kind)

    def _complaint(self, plan: AttentionPlan, q: Tensor, error: float, allowed: float) -> str:
        degrees = self._mesh.degrees
        choices = [] if self._kernel == "sdpa" else ["attention sdpa"]
        choices += ["ulysses_degree 1"] * (degrees.ulysses > 1) + ["ring_degree 1"] * (degrees.ring > 1)
        return (
            f"attention {self._kernel!r} failed its check at {plan.token_ranges[-1][1]} tokens"
            f" ({plan.heads} heads of {q.shape[3]} channels in {str(q.dtype).removeprefix('torch.')}, split as"
            f" {degrees}): sampled rows differ by {error:.2g} (relative; allowed {allowed:.2g}) from exact attention."
            f" Use {' or '.join(choices) or 'another size'}, and please report this with your GPU and your version of"
            f" torch ({torch.__version__})."
        )


def row_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: AttentionPlan,
    mesh: Mesh,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compares sampled rows of an attention with their exact values. Collective over the ranks of the sequence.

    Args:
        q, out: this rank's queries and their attention, [B, H, Q_r, D].
        k, v: this rank's keys and values, [B, G, K_r, D].
        mask: mask of the whole attention, boolean or additive, [.., 1 or H, 1 or Q, K], with tokens in the order of the
            ranks.

    Returns:
        The errors ‖out − exact‖ / max(‖exact‖, ‖noise‖) of this rank's sampled rows, [B, H, rows], with norms over the
        channels, and a boolean: True if all exact rows are finite. The noise is that of probabilities with independent
        relative errors of 1, sqrt(Σ p²·v²): where large values cancel, it exceeds the result. The error is 0 for a row
        whose keys are all masked: its attention is undefined, and kernels differ in it.
    """
    rows = sampled_rows(plan.token_ranges)
    start, stop = plan.token_ranges[mesh.sp_rank]
    own = [i for i, row in enumerate(rows) if start <= row < stop]
    local = torch.tensor([rows[i] - start for i in own], dtype=torch.int64, device=q.device)
    batch, heads, _, dim = q.shape
    queries = torch.zeros(batch, heads, len(rows), dim, dtype=torch.float64, device=q.device)
    queries[:, :, own] = q[:, :, local].double()
    mesh.reduce(queries, dist.ReduceOp.SUM)  # exact: only one rank contributes to each row
    first, last = plan.key_ranges[mesh.sp_rank]
    bias = None if mask is None else _bias(mask, rows, slice(first, last))
    exact, noise, largest = _reference(queries * dim**-0.5, k, v, mesh, bias)
    finite = exact.isfinite().all()
    exact, noise, largest = exact[:, :, own], noise[:, :, own], largest[:, :, own]
    difference = (out[:, :, local].double() - exact).norm(dim=-1)
    errors = difference / torch.maximum(exact.norm(dim=-1), noise.norm(dim=-1)).clamp_min(_TINY)
    return errors.where(largest > _LOWEST / 2, 0.0), finite


def _bias(mask: Tensor, rows: list[int], keys: slice) -> Tensor:
    """Returns the additive mask of these rows and keys, fp64 and finite: all keys of a rank may be masked, and its
    largest score must not be −∞."""
    if mask.ndim == 3:
        mask = mask[:, None]
    mask = mask[..., keys]
    mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill_(~mask, _LOWEST)
    return mask.double().clamp(min=_LOWEST)


def _reference(queries: Tensor, k: Tensor, v: Tensor, mesh: Mesh, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the attention of scaled queries [B, H, n, D] to the keys of all ranks, its noise (see `row_errors`), and
    each row's largest score."""
    shape, dim = queries.shape, v.shape[3]
    repeats = shape[1] // k.shape[1]
    largest = queries.new_full(shape[:-1], _LOWEST)
    sums = queries.new_zeros(*shape[:-1], 1 + 2 * dim)  # Σ p, Σ p·v, Σ p²·v²
    for at, (keys, values) in enumerate(zip(k.split(_KEYS_AT_ONCE, 2), v.split(_KEYS_AT_ONCE, 2), strict=True)):
        if not keys.shape[2]:  # a rank may have none
            continue
        keys, values = (x.double().repeat_interleave(repeats, dim=1) for x in (keys, values))
        scores = queries @ keys.transpose(2, 3)
        if bias is not None:
            scores += bias[..., at * _KEYS_AT_ONCE :][..., : keys.shape[2]]
        new = torch.maximum(largest, scores.amax(-1))
        _rescale(sums, largest, new)
        p = (scores - new[..., None]).exp_()
        sums += torch.cat((p.sum(-1, keepdim=True), p @ values, p.square() @ values.square()), dim=-1)
        largest = new
    own = largest.clone()
    mesh.reduce(largest, dist.ReduceOp.MAX)
    _rescale(sums, own, largest)
    mesh.reduce(sums, dist.ReduceOp.SUM)
    total, weighted, squares = sums.split((1, dim, dim), dim=-1)
    return weighted / total, squares.sqrt() / total, largest


def _rescale(sums: Tensor, before: Tensor, after: Tensor) -> None:
    """Rescales, in place, sums that are relative to the maximum `before` to the maximum `after`."""
    factor = (before - after).exp_()[..., None]
    dim = (sums.shape[-1] - 1) // 2
    sums[..., : 1 + dim] *= factor
    sums[..., 1 + dim :] *= factor.square()


def _tf32() -> bool:
    """Returns True if fp32 products may be computed in TF32 on CUDA, by either of PyTorch's settings for this."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return precision == "tf32" if precision is not None else bool(torch.backends.cuda.matmul.allow_tf32)
