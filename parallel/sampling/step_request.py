"""Requests to the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..wire.messages import Request
from ..wire.shared import TensorRef
from ..wire.trees import Tree

OF_ALL_SAMPLES = ("transformer_options.sample_sigmas", "transformer_options.sigmas")
"""Tensors of a call that have no batch dimension, whatever their length: the sampling's schedule, and the step's sigma,
which ComfyUI repeats for the samples of one condition, regardless of the number of conditions in the call."""


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One call of the network."""

    x: Tensor
    """Latent as the network takes it, e.g. [B, C, T, H, W], in the compute dtype. If it has several parts, they are
    packed as by ComfyUI's samplers, [B, 1, N]."""
    timestep: Tensor
    """Timestep as the network takes it."""
    conditioning: Mapping[str, Tensor]
    """Maps names to tensors; only those that changed since an earlier step are sent."""
    arguments: Tree
    """Tree of all arguments, `args` and `named`; tensors by their names: `x`, `timestep`, those of the conditioning."""
    label: str = ""
    """Name of the call within a step, e.g. for cond and uncond: a cache does not use the state of one for another."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Shapes of the latent's parts, [C, …] each, in packing order; empty if it is one tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        tensors = {"x": self.x, "timestep": self.timestep, **self.conditioning}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def message(self, x: TensorRef, timestep: TensorRef, out: TensorRef, held: dict[str, str]) -> Request:
        """Returns the message to the workers.

        Args:
            x, timestep, out: places in shared memory; `out` is that of the prediction.
            held: maps names in the conditioning to the keys of the tensors that the workers hold.
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
