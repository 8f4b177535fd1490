"""What is asked of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..wire.trees import Tree


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One call of the network."""

    x: Tensor
    """Latent as ComfyUI hands it to its own network, e.g. [B, C, T, H, W], in the compute dtype. If it
    has several parts, they are packed as by ComfyUI's samplers, [B, 1, N]."""
    timestep: Tensor
    """As ComfyUI hands it over."""
    conditioning: Mapping[str, Tensor]
    """Input name → tensor; only what changed since an earlier step travels."""
    label: str = ""
    """Names what is computed among the calls of a step, e.g. cond and uncond: what a cache remembers of one of them is
    not for another."""
    arguments: Tree = None
    """Of a network of ComfyUI's own class, all of them; tensors by their names: `x`, `timestep`, those of the
    conditioning."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Shapes of the latent's parts, [C, …] each, in the order of their packing; none where it is one tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        tensors = {"x": self.x, "timestep": self.timestep, **self.conditioning}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def plain(self) -> dict[str, Any]:
        """What the workers are told of it, beside its tensors."""
        if self.arguments is None:
            return {"label": self.label}
        return {"label": self.label, "arguments": self.arguments, "parts": self.parts}
