"""Linear layers whose weights are kept in fp8, and made in the input's dtype for the time of each call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ScaledLinear(nn.Linear):
    """The true weight is `weight` (fp8) × `scale`."""

    scale: Tensor
    """Of each row, a parameter [N, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype).mul_(self.scale), bias)
