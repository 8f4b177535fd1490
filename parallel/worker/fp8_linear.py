"""Linear layers that multiply in FP8, or only store their weights in it, and the quantisation of their weights.

torchao does the same with tensor subclasses; `tests/golden/torchao` holds its results for comparison. This module uses
only torch: users keep the torch version of their ComfyUI, which may not fit a torchao release. Also, torchao 0.18
returns NaN for rows that are all zero, quantises from bf16 only (Wan runs in fp16, and fp8 files would be rounded
twice), and makes about eight passes over the activations unless compiled; here it is two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantise.settings import DYNAMIC, TENSORWISE

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scale of rows that are all zero: 0 / 0 would be NaN."""
_PRODUCT = torch.bfloat16
"""Output dtype that row-wise products support in every version of PyTorch; other dtypes are cast to and from it."""
_ALLOWED = 0.1
"""Maximum relative L2 error of an FP8 layer with random weights; rounding alone causes 0.04."""


def to_fp8(x: Tensor, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Rounds x to e4m3, scaled so that the largest magnitude of each row, or of the tensor, becomes e4m3's maximum.

    Returns:
        x [M, K] in fp8, contiguous; scales in fp32, [M, 1] or [1, 1]. Their product approximates the argument.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1 if rowwise else (0, 1), keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp_(min=_SMALLEST_SCALE)
    if torch.compiler.is_compiling():
        return (x / scale).to(E4M3), scale
    # One pass over x; `(x / scale).to(…)` makes two, with an fp32 intermediate.
    return torch.div(x, scale, out=torch.empty(x.shape, dtype=E4M3, device=x.device)), scale


class FP8Linear(nn.Linear):
    """y = x·Wᵀ + b with both factors in e4m3 and fp32 accumulation; activations are rounded at each call.

    `weight` is [N, K] e4m3. `scale` is fp32, [N, 1] (row-wise: one for each output channel, and for each token) or
    [1, 1] (tensor-wise). A row-wise scale of a token does not depend on other tokens, so the result does not depend on
    how tokens are split over ranks; a tensor-wise scale is computed over this rank's tokens.
    """

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not input.numel():
            return input.new_empty(*input.shape[:-1], self.out_features)
        x, scale = to_fp8(input.reshape(-1, self.in_features), rowwise=len(self.scale) > 1)
        out = torch._scaled_mm(
            x,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            bias=None if self.bias is None else self.bias.to(_PRODUCT),
            out_dtype=_PRODUCT,
            use_fast_accum=True,
        )
        return out.view(*input.shape[:-1], self.out_features).to(input.dtype)


class ScaledLinear(nn.Linear):
    """Linear layer with fp8 weights; each call temporarily restores `weight` × `scale` in the input's dtype."""

    scale: Tensor
    """Scale of each row, a parameter [N, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype).mul_(self.scale), bias)


def quantised(scheme: str, weight: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Quantises a linear layer's weight under a scheme; row-wise schemes quantise each row independently.

    Args:
        weight: [N, K]. A weight in e4m3 is kept unchanged, so that fp8 is not rounded twice.
        scale: scale of a weight in fp8 (1 if it has none).

    Returns:
        [N, K] e4m3; [N, 1] or [1, 1] fp32.
    """
    if weight.dtype != E4M3:
        return to_fp8(weight if scale is None else weight.float().mul_(scale), rowwise=scheme != TENSORWISE)
    assert scale is not None
    return weight, torch.full((len(weight) if scheme != TENSORWISE else 1, 1), scale, device=weight.device)


def become_fp8(layer: nn.Linear, scheme: str) -> None:
    """Converts a linear layer in place to the scheme's class, with the parameters that it needs, as meta tensors."""
    rows = layer.out_features if scheme != TENSORWISE else 1
    layer.__class__ = FP8Linear if scheme in DYNAMIC else ScaledLinear
    layer._parameters["weight"] = nn.Parameter(torch.empty_like(layer.weight, dtype=E4M3, device="meta"), False)
    layer._parameters["scale"] = nn.Parameter(torch.empty(rows, 1, dtype=torch.float32, device="meta"), False)


def fp8_layer(layer: nn.Linear, scheme: str) -> nn.Linear:
    """Returns a copy of a layer, quantised under a scheme, with the same bias."""
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.bias = layer.bias
    become_fp8(new, scheme)
    data, scale = quantised(scheme, layer.weight.detach())
    new._parameters |= {"weight": nn.Parameter(data, False), "scale": nn.Parameter(scale, False)}
    return new


def support(device: torch.device) -> dict[str, str]:
    """Tests the products of each dynamic scheme on this device: PyTorch does not have all of them for every GPU.

    Returns:
        The reason why each scheme does not work; an empty string for a scheme that works.
    """
    if device.type != "cuda":
        return dict.fromkeys(DYNAMIC, "CPUs do not compute in FP8")
    return {scheme: _problem(scheme, device) for scheme in DYNAMIC}


def _problem(scheme: str, device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((37, 256), (128, 256), (128,)))
    layer = nn.Linear(256, 128, device="meta")
    layer.weight, layer.bias = (nn.Parameter(p.to(device, _PRODUCT), False) for p in (weight, bias))
    try:
        found = fp8_layer(layer, scheme)(x.to(device, _PRODUCT)).float().cpu()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # PyTorch's errors for missing kernels
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    expected = F.linear(x, weight, bias)
    error_of_it = ((found - expected).norm() / expected.norm()).item()
    return "" if error_of_it <= _ALLOWED else f"its FP8 product is wrong by {error_of_it:.0%}"
