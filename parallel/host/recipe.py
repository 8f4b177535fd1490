"""Description of the network that the workers build, as plain data; reads no file and starts no process."""

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
    """One network for the workers to build. Made by `nodes.native_model` and by `diffusers.folder.recipe`."""

    library: Library
    """Library that defines its class."""
    path: str
    """Path of its file, or of its diffusers folder."""
    weight_dtype: torch.dtype | None
    """Dtype of its weights in memory, as chosen by the user; None leaves the choice to the library."""
    network: str
    """Name of its class."""
    config: SequenceParallelConfig
    nbytes: int
    """Bytes of the weights in the form that the workers keep."""
    in_the_file: int
    """Bytes of these that the file holds in the same form."""
    heads: int
    """Number of attention heads; with several kinds of attention, the smallest number."""
    arguments: Mapping[str, Any]
    """Constructor arguments of the class: the result of ComfyUI's model detection, or diffusers' `config.json`."""
    channels: int
    """Number of channels of its prediction."""
    channels_dim: int = 1
    """Dimension of the channels in the latent."""
    linear: tuple[LinearLayer, ...]
    """Its linear layers, for FP8; empty if the file is quantised."""
    quantised: str = ""
    """Format in which the file is quantised; empty if it is not."""
    planned: bool = True
    """True if the class has a split plan; otherwise only samples, and cond and uncond, run side by side."""
    pack: str = ""
    """Folder of ComfyUI-GGUF, if its code reads the file and computes with it; empty if the library's own does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the library needs in a worker; for ComfyUI see `comfyui.start.prepare`."""

    def to_json(self) -> dict[str, Any]:
        dtype = None if self.weight_dtype is None else str(self.weight_dtype).removeprefix("torch.")
        named = {name: getattr(self, name) for name in ("library", "path", "network", "pack", "options")}
        return {**named, "weight_dtype": dtype}
