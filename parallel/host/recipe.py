"""What to load, as plain data: nothing is read from disk but the header, and no process is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import registry
from ..adapters.base import Adapter
from ..checkpoints.source import Source, open_source
from ..config import SequenceParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One model as the workers are to hold it. Equal recipes are the same model."""

    path: str
    """Single-file checkpoint, or diffusers folder."""
    weight_dtype: torch.dtype
    """Weights are rounded to this; fp8 ones also stay so in memory."""
    compute_dtype: torch.dtype
    """Arithmetic, latents and conditioning."""
    config: SequenceParallelConfig

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a checkpoint's header tells."""

    source: Source
    adapter: Adapter
    model_config: dict[str, Any]


def inspect(path: str) -> Inspected:
    """Reads a checkpoint's header and finds its family.

    Raises:
        CheckpointError: missing, damaged or incomplete.
        UnsupportedError: of no supported family.
    """
    source = open_source(path)
    adapter = registry.adapter_for(source)
    return Inspected(source, adapter, adapter.model_config(source))


def weight_bytes(inspected: Inspected, recipe: Recipe) -> int:
    """Of a whole copy of the weights as the workers keep them, but for the few that keep another dtype."""
    fp8 = recipe.weight_dtype.itemsize == 1
    dtype = recipe.weight_dtype if fp8 else recipe.compute_dtype
    source = inspected.source
    return sum(
        torch.Size(info.shape).numel() * (info.dtype if name in source.scales else dtype).itemsize
        for name, info in source.tensors.items()
    )
