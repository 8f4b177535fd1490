"""Finds where values stop being finite (NaN or infinite) in a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..split.blocks import blocks_of_any, planned_blocks
from ..wire.messages import NotFinite


def all_finite(x: Tensor) -> Tensor:
    """Returns a boolean tensor on x's device, without synchronising."""
    return torch.isfinite(x).all()


class FirstNotFinite:
    """Finds the first input or block output with values that are not finite in a run of a network.

    It synchronises with the device after each block, and so is meant for a step that has already failed.

    Args:
        plan: the network's split plan, which names its blocks; if it is empty, the blocks are guessed.
    """

    def __init__(self, network: nn.Module, plan: Iterable[str]):
        names = {module: name for name, module in network.named_modules()}
        blocks = planned_blocks(network, plan) or blocks_of_any(network)
        self._blocks = {block: names[block] for block in blocks}
        self._ran = 0
        self._first: tuple[int, str] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Checks the output of every block that runs inside the context."""
        handles = [block.register_forward_hook(self._after) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def given(self, inputs: Mapping[str, Tensor]) -> None:
        """Checks the network's inputs for NaN. Infinite values are allowed, since masks contain them."""
        for name, tensor in inputs.items():
            if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                self._first = self._first or (-1, name)

    def found(self, finite: bool) -> NotFinite:
        """Returns the first place found.

        Args:
            finite: whether this rank's part of the prediction is finite.
        """
        place, name = self._first or (self._ran, "")
        return NotFinite(place=place, name=name, blocks=self._ran, finite=finite)

    def _after(self, block: nn.Module, _: Any, out: Any) -> None:
        if self._first is None and not all(bool(all_finite(tensor)) for tensor in _tensors(out)):
            self._first = self._ran, self._blocks[block]
        self._ran += 1


def _tensors(value: Any) -> list[Tensor]:
    """Returns the floating-point tensors in a nested structure."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
