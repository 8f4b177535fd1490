"""What is asked of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..wire.messages import Request
from ..wire.shared import TensorRef
from ..wire.trees import Tree

OF_ALL_SAMPLES = ("transformer_options.sample_sigmas", "transformer_options.sigmas")
"""Tensors of a call that are no batch of it, whatever their length: the sampling's schedule, and the step's sigma, that
ComfyUI repeats for the samples of one condition, however many conditions are in the call."""


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One call of the network."""

    x: Tensor
    """The latent as the network takes it, e.g. [B, C, T, H, W], in the compute dtype. If it has several parts, they are
    packed as by ComfyUI's samplers, [B, 1, N]."""
    timestep: Tensor
    """As the network takes it."""
    conditioning: Mapping[str, Tensor]
    """Name → tensor; only what changed since an earlier step travels."""
    arguments: Tree
    """All of them, `args` and `named`; tensors by their names: `x`, `timestep`, those of the conditioning."""
    label: str = ""
    """Names what is computed among the calls of a step, e.g. cond and uncond: what a cache remembers of one of them is
    not for another."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Shapes of the latent's parts, [C, …] each, in the order of their packing; none where it is one tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        tensors = {"x": self.x, "timestep": self.timestep, **self.conditioning}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def message(self, x: TensorRef, timestep: TensorRef, out: TensorRef, held: dict[str, str]) -> Request:
        """What the workers are told of it.

        Args:
            x, timestep, out: places, the last one of the prediction.
            held: name in the conditioning → key of what they keep.
        """
        return Request(
            x=x,
            timestep=timestep,
            out=out,
            conditioning=held,
            label=self.label,
            arguments=self.arguments,
            parts=[list(part) for part in self.parts],
        )
