"""The tensors of a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_WHOLE = "diffusion_pytorch_model.safetensors"


def mapped(path: str) -> dict[str, Tensor]:
    """All tensors of a folder, by its names, mapped.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(path)
    found: dict[str, Tensor] = {}
    try:
        for name in _files(folder):
            found |= load_file(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    return found


def _files(folder: Path) -> list[str]:
    """Names of those that have tensors; none other is read.

    Raises:
        ValueError: the index is damaged.
    """
    if not (folder / _INDEX).exists():
        return [_WHOLE]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{_INDEX} does not say which tensors are where")
    return sorted(set(where.values()))
