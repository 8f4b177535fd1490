"""Runs a block a second time with the recorded attention results of the first run, without any other rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..split.in_graph import Calls, How
from ..split.routes import Route

_PROBED = 256
"""Approximate number of tokens of q, k and v that are kept and compared; attention results are kept whole."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns ‖found − expected‖ / ‖expected‖; for tensors that are not floating-point, the fraction that differs."""
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return float((found != expected).float().mean())
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in (found - expected, expected)]
    size, of = torch.stack(norms).tolist()
    return float(size / of) if of else float(size)


@dataclass(frozen=True, slots=True)
class _Attention:
    """A recorded attention."""

    site: int
    how: How
    inputs: tuple[Tensor | None, ...]
    """Sampled tokens of q, k and v, and sampled rows of the mask."""
    result: Tensor


class Recorded(Calls):
    """Attention calls that run normally and record their inputs and results."""

    def __init__(self, routes: Sequence[Route | None], options: Mapping[str, Any]):
        super().__init__(routes, options)
        self.attentions: list[_Attention] = []

    def attend(self, site: int, how: How, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        inputs = _probed(q, k, v, mask)
        result = super().attend(site, how, q, k, v, mask)
        self.attentions.append(_Attention(site, how, inputs, result))
        return result


class Replayed(Calls):
    """Attention calls that return the recorded results.

    Attributes:
        differences: name and relative difference of each input from the recorded one.

    Raises:
        ValueError: from `attend` and `end`, if the block's attention calls differ from the recorded ones.
    """

    def __init__(self, recorded: Recorded):
        super().__init__((), {})
        self._left = list(recorded.attentions)
        self._done = 0
        self.differences: list[tuple[str, float]] = []

    def expect(self, site: int) -> None:
        """Does nothing: the recorded run has already called it."""

    def attend(self, site: int, how: How, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        self._done += 1
        before = self._left.pop(0) if self._left else None
        inputs = _probed(q, k, v, mask)
        if before is None or (site, how) != (before.site, before.how) or not _alike(inputs, before.inputs):
            raise ValueError(f"compiled, attention {self._done} of the block is another one than uncompiled")
        for name, found, expected in zip(("q", "k", "v", "mask"), inputs, before.inputs, strict=True):
            if found is not None and expected is not None:
                self.differences.append((f"{name} of attention {self._done}", difference(found, expected)))
        return before.result.clone()

    def end(self) -> None:
        """Checks, after the block has run, that every recorded attention was called."""
        if self._left:
            raise ValueError(f"compiled, the block attends {self._done} times, and {len(self._left)} more uncompiled")


def _probed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copies some tokens, evenly spread over all tokens of this rank."""
    kept = [x[:, :, :: max(1, x.shape[2] // _PROBED)].clone() for x in (q, k, v)]
    rows = None if mask is None else mask.reshape(-1, mask.shape[-1])
    return (*kept, None if rows is None else rows[:: max(1, len(rows) // _PROBED)].clone())


def _alike(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    def what(x: Tensor | None) -> Any:
        return None if x is None else (x.shape, x.dtype)

    return [what(x) for x in some] == [what(x) for x in others]
