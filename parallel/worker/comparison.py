"""How far two computations of one step may differ: by what rounding explains in this network, measured, and no more.

Below fp32, different row counts select different kernels, and depth amplifies their rounding; by how much depends on
the network. So the reference is computed twice, the second time with some of its input moved by an ulp, as rounding it
once more would. What that changes is the network's noise: in bfloat16 a ring's rounding makes 0.7 to 1.0 times as much,
at 2 and at 24 blocks, in each family (tiny models, random weights).

An error that is not noise is seen in two figures: the norm of the difference, and its slope along the reference, in
which noise cancels, so that a prediction that is 1 % too large is found even under more noise than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-4
"""Allowed of both figures in fp32."""
CAP = 0.2
"""Allowed of both figures at most, whatever the noise; a wrong split makes 0.4 or more."""
_NORM_PER_NOISE, _SLOPE_PER_NOISE = 4.0, 0.5
_MOVED = 1 / 12
"""Part of the input that is moved: an ulp in one element of twelve has the mean square of a rounding error."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Limits of a `Difference`."""

    norm: float
    slope: float

    @classmethod
    def of_noise(cls, noise: float, dtype: torch.dtype) -> Allowed:
        """For a norm of the noise: a multiple of it, not less than one ulp (of the slope, half), not above `CAP`."""
        ulp = torch.finfo(dtype).eps
        norm, slope = max(_NORM_PER_NOISE * noise, ulp), max(_SLOPE_PER_NOISE * noise, ulp / 2)
        return cls(min(norm, CAP), min(slope, CAP))


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a result from its reference."""

    norm: float
    """‖result − reference‖ / ‖reference‖."""
    slope: float
    """|⟨result − reference, reference⟩| / ‖reference‖²: 0.01 if the result is 1 % too large."""

    def within(self, allowed: Allowed) -> bool:
        """False for what is not a number, too."""
        return self.norm <= allowed.norm and self.slope <= allowed.slope

    def __str__(self) -> str:
        return f"{self.norm:.2g}, of which {self.slope:.2g} along it"


def products(result: Tensor, reference: Tensor) -> Tensor:
    """‖result − reference‖², ⟨result − reference, reference⟩ and ‖reference‖² in fp64: they add up over parts."""
    reference = reference.double()
    error = result.double() - reference
    return torch.stack(((error * error).sum(), (error * reference).sum(), (reference * reference).sum()))


def difference(sums: Tensor) -> Difference:
    """From summed `products`; of nothing, nothing."""
    square, along, size = sums.tolist()
    if size == 0:
        return Difference(square**0.5, 0.0)
    return Difference((square / size) ** 0.5, abs(along) / size)


def moved(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` with one element of twelve moved by an ulp of `dtype`, up or down; the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(x.shape, generator=generator) < _MOVED
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    # Between two powers of 2 an ulp is 0.5 to 1 eps of the value: 0.75 eps is rounded to one ulp.
    factor = 1 + (chosen * sign).to(x.device) * (0.75 * torch.finfo(dtype).eps)
    return (x.to(dtype).double() * factor).to(dtype).to(x.dtype)
