"""A checkpoint's tensors in the layout of a single file, whatever the layout on disk: the inverse of `pieces`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.source import Reader, Source, Stored
from .base import Adapter, Piece


class NativeTensors:
    """Of a single file the tensors as it has them; of a diffusers folder ComfyUI's, put together from its parameters.

    Args:
        source: the checkpoint.
        adapter: of its family.
        config: as `Adapter.model_config` gave it.

    Attributes:
        shapes: name → shape of every tensor.
    """

    def __init__(self, source: Source, adapter: Adapter, config: Mapping[str, Any]):
        self._source, self._adapter, self._config = source, adapter, config
        self.shapes: dict[str, tuple[int, ...]] = (
            adapter.native_tensors(config)
            if source.is_diffusers
            else {name: info.shape for name, info in source.tensors.items()}
        )

    def pieces(self, name: str) -> list[Piece]:
        """Parameters of the diffusers model that the tensor becomes, see `Adapter.pieces`."""
        return self._adapter.pieces(name, self.shapes[name], self._config)

    def read(self, name: str, read: Reader) -> Stored:
        """The tensor as the checkpoint has it, on the CPU; copy it before changing it.

        Raises:
            CheckpointError: the file changed or is damaged.
        """
        if not self._source.is_diffusers:
            return read.stored(name)
        pieces = self.pieces(name)
        parts = [read(piece.name) for piece in pieces]
        whole = torch.empty(self.shapes[name], dtype=parts[0].dtype)
        rows = torch.arange(len(whole))
        for piece, part in zip(pieces, parts, strict=True):
            whole[piece.take(rows)] = part.to(whole.dtype)
        return Stored(whole)
