"""Weights that are replaced as a LoRA would have it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from parallel.diffusers.tensors import mapped
from tests.aligned import align

WEIGHTS = "diffusion_pytorch_model.safetensors"


def change(tensor: Tensor, factor: float = 1.5) -> Tensor:
    """What the tests replace a weight by."""
    return (tensor.float() * factor + 0.01).to(tensor.dtype)


def changed(path: Path, factor: float = 1.5) -> Callable[[str], Tensor]:
    """The weights of a folder, changed; for `RemoteWeights.replace`."""
    tensors = mapped(str(path))
    return lambda name: change(tensors[name], factor)


def write_changed(path: Path, folder: Path) -> list[str]:
    """A copy of a folder with every weight changed; returns their names."""
    shutil.copytree(path, folder)
    tensors = mapped(str(path))
    save_file({name: change(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)
    align(folder / WEIGHTS)
    return list(tensors)
