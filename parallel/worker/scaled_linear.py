"""A linear layer whose weight is kept in fp8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ScaledLinear(nn.Linear):
    """The true weight is `weight` (fp8) × `scale`; it is made in the input's dtype, for the time of each call."""

    scale: float | Tensor
    """One for the whole weight, or one for each row, [N, 1] in fp32."""

    @classmethod
    def keep(cls, layer: nn.Module, weight: Tensor, scale: float) -> None:
        """Gives a linear layer this fp8 weight and this scale."""
        layer.__class__ = cls
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer.scale = scale  # type: ignore[assignment]  # a plain number: no cast of the module rounds it

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype).mul_(self.scale), self.bias)
