"""The golden files: inputs, what a real ComfyUI made of them, and the recipe of the checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """One case. A forward has `x` and `timestep`; a trajectory has `noise` and `sigmas`."""

    checkpoint: dict[str, Any]
    """Family, and options of its writer in `parallel.demo.checkpoint`."""
    digest: str
    """Of the checkpoint's tensors, see `digest`."""
    made_by: str
    tensors: dict[str, Tensor]

    @property
    def conditioning(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in _CONDITIONING if name in self.tensors}


_CONDITIONING = ("context", "y", "guidance", "attention_mask", "clip_fea")


def digest(checkpoint: Path) -> str:
    """SHA-256 over names, shapes and values."""
    result = hashlib.sha256()
    for name, tensor in sorted(load_file(checkpoint).items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def names() -> list[str]:
    """The committed cases."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def read(name: str) -> Golden:
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return Golden(json.loads(metadata["checkpoint"]), metadata["digest"], metadata["made_by"], load_file(path))


def write(name: str, golden: Golden) -> None:
    metadata = {"checkpoint": json.dumps(golden.checkpoint), "digest": golden.digest, "made_by": golden.made_by}
    tensors = {key: tensor.contiguous() for key, tensor in golden.tensors.items()}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata=metadata)
