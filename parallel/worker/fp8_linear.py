"""Linear layers that multiply in FP8, or keep their weights in it, and how weights get there.

torchao does the same with tensor subclasses, and `tests/golden/torchao` holds its results to compare with. Here it is
done with what torch has itself. Users keep the torch of their ComfyUI, which a torchao may not fit. And torchao 0.18
makes NaN of rows that are all zero, quantises from bf16 only (Wan runs in fp16, and fp8 files would be rounded twice),
and takes some eight passes over the activations unless compiled; here it is two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantise.settings import DYNAMIC, TENSORWISE

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Of rows that are all zero: 0 / 0 would be NaN."""
_PRODUCT = torch.bfloat16
"""What row-wise products give in every version of PyTorch; other dtypes are cast to and from it."""
_ALLOWED = 0.1
"""Relative L2 error of a layer in FP8 with random weights; 0.04 is what rounding alone makes."""


def to_fp8(x: Tensor, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Rounds to e4m3, so that the largest magnitude of each row, or of all, becomes the largest e4m3 has.

    Returns:
        x [M, K] in fp8, contiguous; scales in fp32, [M, 1] or [1, 1]: their product is about the given x.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1 if rowwise else (0, 1), keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp_(min=_SMALLEST_SCALE)
    if torch.compiler.is_compiling():
        return (x / scale).to(E4M3), scale
    # One pass over x, where `(x / scale).to(…)` takes two, with fp32 in between.
    return torch.div(x, scale, out=torch.empty(x.shape, dtype=E4M3, device=x.device)), scale


class FP8Linear(nn.Linear):
    """y = x·Wᵀ + b with both factors in e4m3, and sums in fp32; activations are rounded at each call.

    `weight` is [N, K] e4m3. `scale` is fp32, [N, 1] (row-wise: one for each output channel, and for each token) or
    [1, 1] (tensor-wise). A token's own scale does not depend on other tokens, so the result does not depend on how
    these are split over ranks; a tensor-wise one is of the tokens of this rank.
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
    """The true weight is `weight` (fp8) × `scale`, and is made in the input's dtype for the time of each call."""

    scale: Tensor
    """Of each row, a parameter [N, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype).mul_(self.scale), bias)


def quantised(scheme: str, weight: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """A linear layer's weight and scale under a scheme; of row-wise ones each row is for itself.

    Args:
        weight: [N, K]. e4m3 is taken over as it is, so that fp8 is not rounded twice.
        scale: of a weight in fp8 (1 where it has none).

    Returns:
        [N, K] e4m3; [N, 1] or [1, 1] fp32.
    """
    if weight.dtype != E4M3:
        return to_fp8(weight if scale is None else weight.float().mul_(scale), rowwise=scheme != TENSORWISE)
    assert scale is not None
    return weight, torch.full((len(weight) if scheme != TENSORWISE else 1, 1), scale, device=weight.device)


def become_fp8(layer: nn.Linear, scheme: str) -> None:
    """Makes a linear layer one of the scheme, with the parameters that it needs, still without data."""
    rows = layer.out_features if scheme != TENSORWISE else 1
    layer.__class__ = FP8Linear if scheme in DYNAMIC else ScaledLinear
    layer._parameters["weight"] = nn.Parameter(torch.empty_like(layer.weight, dtype=E4M3, device="meta"), False)
    layer._parameters["scale"] = nn.Parameter(torch.empty(rows, 1, dtype=torch.float32, device="meta"), False)


def fp8_layer(layer: nn.Linear, scheme: str) -> nn.Linear:
    """A layer under a scheme, with the same bias."""
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.bias = layer.bias
    become_fp8(new, scheme)
    data, scale = quantised(scheme, layer.weight.detach())
    new._parameters |= {"weight": nn.Parameter(data, False), "scale": nn.Parameter(scale, False)}
    return new


def support(device: torch.device) -> dict[str, str]:
    """Tries the products of each dynamic scheme on this device: PyTorch does not have all of them for every GPU.

    Returns:
        Scheme → why it does not work; empty where it does.
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
    except (RuntimeError, ValueError, NotImplementedError) as error:  # what PyTorch says of missing kernels
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    expected = F.linear(x, weight, bias)
    error_of_it = ((found - expected).norm() / expected.norm()).item()
    return "" if error_of_it <= _ALLOWED else f"its FP8 product is wrong by {error_of_it:.0%}"
