"""What the workers build, as plain data: nothing is read from disk, and no process is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import SequenceParallelConfig
from ..plans import Library
from ..quantise.selection import LinearLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One network as the workers are to hold it. Made by `nodes.native_model`, and by `diffusers.folder.recipe`."""

    library: Library
    """Whose class it is."""
    path: str
    """Its file, or diffusers' folder."""
    weight_dtype: torch.dtype | None
    """In which its weights are kept, as the user chose it; None leaves it to the library."""
    network: str
    """Name of the class."""
    config: SequenceParallelConfig
    nbytes: int
    """Of the weights, as the workers keep them."""
    in_the_file: int
    """How many of these are in the file as they are."""
    heads: int
    """Of its attention; of several kinds the fewest."""
    arguments: Mapping[str, Any]
    """By which the class makes a network: what ComfyUI's detection has found, or diffusers' `config.json`."""
    channels: int
    """Of its prediction."""
    channels_dim: int = 1
    """Where the latent has them."""
    linear: tuple[LinearLayer, ...]
    """Its linear layers, for FP8; none of a file that is quantised."""
    quantised: str = ""
    """How the file is quantised."""
    planned: bool = True
    """Whether the class has a split plan; else only samples, and cond and uncond, run side by side."""
    pack: str = ""
    """Folder of ComfyUI-GGUF, whose code reads the file and computes with it; empty where the library does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the library needs to know in a worker: of ComfyUI, see `comfyui.start.prepare`."""

    def to_json(self) -> dict[str, Any]:
        dtype = None if self.weight_dtype is None else str(self.weight_dtype).removeprefix("torch.")
        named = {name: getattr(self, name) for name in ("library", "path", "network", "pack", "options")}
        return {**named, "weight_dtype": dtype}
