"""What is asked of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One call of the network."""

    x: Tensor
    """Latent as ComfyUI hands it to its own network, e.g. [B, C, T, H, W], in the compute dtype."""
    timestep: Tensor
    """As ComfyUI hands it over."""
    conditioning: Mapping[str, Tensor]
    """Input name → tensor; only what changed since an earlier step travels."""
    label: str = ""
    """Names what is computed among the calls of a step, e.g. cond and uncond: what a cache remembers of one of them is
    not for another."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        tensors = {"x": self.x, "timestep": self.timestep, **self.conditioning}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
