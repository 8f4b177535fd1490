"""The shared memory of a group, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..wire.shared import Segment, TensorRef, lay_out

_LENT_AT_MOST = 4
"""Steps whose results stay where the workers wrote them until the caller lets go; multistep samplers keep three."""


class GroupMemory:
    """The segments that the host owns; the workers learn of a new one with the next message."""

    def __init__(self) -> None:
        self._segments: dict[str, Segment] = {}
        self._new: dict[str, Segment] = {}

    def segment(self, name: str, size: int) -> Segment:
        """The segment `name`, with room for at least `size` bytes."""
        current = self._segments.get(name)
        if current is not None and current.size >= size:
            return current
        segment = self._segments[name] = self._new[name] = Segment.create(name, size)
        if current is not None:
            current.close()
        return segment

    def write(self, name: str, tensors: Sequence[Tensor]) -> list[TensorRef]:
        """Copies tensors to the start of the segment `name`; returns their places."""
        refs, size = lay_out(name, [(tensor.shape, tensor.dtype) for tensor in tensors])
        segment = self.segment(name, size)
        for tensor, ref in zip(tensors, refs, strict=True):
            segment.tensor(ref).copy_(tensor)
        return refs

    def drop(self, name: str) -> None:
        """Forgets a segment; its memory goes when the workers have dropped it too."""
        self._new.pop(name, None)
        if (segment := self._segments.pop(name, None)) is not None:
            segment.close()

    def clear(self, name: str) -> None:
        """Gives the memory of a segment, if there is one, back to the system; what lies in it is lost."""
        if name in self._segments:
            self._segments[name].clear()

    def for_results(
        self, tensors: Sequence[tuple[Sequence[int], torch.dtype]]
    ) -> tuple[Segment, list[TensorRef], bool]:
        """Room for what the workers are to write.

        Args:
            tensors: shape and dtype of each.

        Returns:
            A segment; where the tensors lie in it; whether they may be lent (`Segment.lend`) or, because the caller
            still holds many, have to be copied out.
        """
        names = (f"results-{i}" for i in range(_LENT_AT_MOST))
        free = (name for name in names if name not in self._segments or not self._segments[name].lent)
        name = next(free, "results")
        refs, size = lay_out(name, tensors)
        return self.segment(name, size), refs, name != "results"

    def announcement(self) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
        """Name and size, and descriptors, of the segments that the workers do not know yet."""
        entries = [{"name": name, "size": segment.size} for name, segment in self._new.items()]
        return entries, tuple(segment.fileno() for segment in self._new.values())

    def announced(self) -> None:
        """The workers have been sent the announcement."""
        self._new = {}

    def close(self) -> None:
        """Drops the descriptors; lent tensors stay valid."""
        for segment in self._segments.values():
            segment.close()
