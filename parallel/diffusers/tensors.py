"""The tensors of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..headers import check_safetensors, read_json

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_WHOLE = "diffusion_pytorch_model.safetensors"
_LONGEST_NAME = 255
"""Maximum length of a file name on Linux."""


def mapped(path: str) -> dict[str, Tensor]:
    """Returns all tensors of a folder, by its names, mapped.

    Raises:
        CheckpointError: a file is missing, damaged, or outside the folder.
    """
    folder = Path(path)
    found: dict[str, Tensor] = {}
    try:
        for name in _files(folder):
            check_safetensors(folder / name)
            found |= load_file(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    return found


def _files(folder: Path) -> list[str]:
    """Returns the names of the files with tensors; no other file is read.

    Raises:
        ValueError: the index is damaged, or names a file outside the folder. A file may be a link to one, as in the
            cache of Hugging Face's hub.
    """
    if not (folder / _INDEX).exists():
        return [_WHOLE]
    index = read_json(folder / _INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{_INDEX} does not say which tensors are where")
    for name in where.values():
        if Path(name).name != name or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f"{_INDEX} names {name[:100]!r}, which is no file of the folder")
    return sorted(set(where.values()))
