"""Shared-memory segments of a worker group, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..wire.shared import Segment, TensorRef, lay_out

_LENT_AT_MOST = 4
"""Number of steps whose results the caller may hold in shared memory, uncopied; multistep samplers hold three."""


class GroupMemory:
    """Segments that the host owns, by name; the next call announces new ones to the workers."""

    def __init__(self) -> None:
        self._segments: dict[str, Segment] = {}
        self._new: dict[str, Segment] = {}

    def segment(self, name: str, size: int) -> Segment:
        """Returns the segment `name`; creates it, or replaces one that has fewer than `size` bytes."""
        current = self._segments.get(name)
        if current is not None and current.size >= size:
            return current
        segment = self._segments[name] = self._new[name] = Segment.create(name, size)
        if current is not None:
            current.close()
        return segment

    def write(self, name: str, tensors: Sequence[Tensor]) -> list[TensorRef]:
        """Copies tensors to the start of the segment `name`; returns references to them."""
        refs, size = lay_out(name, [(tensor.shape, tensor.dtype) for tensor in tensors])
        segment = self.segment(name, size)
        for tensor, ref in zip(tensors, refs, strict=True):
            segment.tensor(ref).copy_(tensor)
        return refs

    def drop(self, name: str) -> None:
        """Removes a segment; its memory is freed once the workers have dropped it too."""
        self._new.pop(name, None)
        if (segment := self._segments.pop(name, None)) is not None:
            segment.close()

    def clear(self, name: str) -> None:
        """Returns the memory of a segment, if it exists, to the system; its contents are lost."""
        if name in self._segments:
            self._segments[name].clear()

    def for_results(
        self, tensors: Sequence[tuple[Sequence[int], torch.dtype]]
    ) -> tuple[Segment, list[TensorRef], bool]:
        """Reserves space for tensors that the workers will write.

        Args:
            tensors: shape and dtype of each tensor.

        Returns:
            A segment; references to the tensors in it; True if they may be lent (`Segment.lend`), False if they must be
            copied out because the caller still holds `_LENT_AT_MOST` others.
        """
        names = (f"results-{i}" for i in range(_LENT_AT_MOST))
        free = (name for name in names if name not in self._segments or not self._segments[name].lent)
        name = next(free, "results")
        refs, size = lay_out(name, tensors)
        return self.segment(name, size), refs, name != "results"

    def announcement(self) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
        """Returns name and size, and file descriptors, of the segments that the workers do not know yet."""
        entries = [{"name": name, "size": segment.size} for name, segment in self._new.items()]
        return entries, tuple(segment.fileno() for segment in self._new.values())

    def announced(self) -> None:
        """Marks the new segments as known to the workers; called once the announcement has been sent."""
        self._new = {}

    def close(self) -> None:
        """Closes the file descriptors; lent tensors stay valid."""
        for segment in self._segments.values():
            segment.close()
