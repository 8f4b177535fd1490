"""Finds where values stop being finite (NaN or infinite) in a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..split.blocks import blocks_of_any, planned_blocks
from ..wire.messages import NotFinite

AT_INPUT, AT_END = -1, 1 << 30
"""Places before the first block, and behind the last one."""


def all_finite(x: Tensor) -> Tensor:
    """A boolean on x's device: nothing waits for it."""
    return torch.isfinite(x).all()


class FirstNotFinite:
    """Watches the blocks of a network that runs, inside a `with` statement.

    Waits for the device behind each block: for a step that has failed already.

    Args:
        plan: of the network, which names its blocks; an empty one leaves it to guess.

    Attributes:
        found: the first place; behind the last block where none was found.
    """

    def __init__(self, network: nn.Module, plan: Iterable[str]):
        names = {module: name for name, module in network.named_modules()}
        blocks = planned_blocks(network, plan) or blocks_of_any(network)
        self._blocks = [(names[block], block) for block in blocks]
        self.found = NotFinite(place=AT_END, name="", blocks=len(blocks))

    def __enter__(self) -> FirstNotFinite:
        self._handles = [
            block.register_forward_hook(lambda _, __, out, place=place, name=name: self._look(out, place, name))
            for place, (name, block) in enumerate(self._blocks)
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for handle in self._handles:
            handle.remove()

    def given(self, inputs: Mapping[str, Tensor]) -> None:
        """Looks at what the network is called with. Masks may be infinite."""
        for name, tensor in inputs.items():
            if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                self._note(AT_INPUT, name)

    def _look(self, value: Any, place: int, name: str) -> None:
        if place < self.found.place and not all(bool(all_finite(tensor)) for tensor in _tensors(value)):
            self._note(place, name)

    def _note(self, place: int, name: str) -> None:
        if place < self.found.place:
            self.found = NotFinite(place=place, name=name, blocks=len(self._blocks))


def _tensors(value: Any) -> list[Tensor]:
    """Floating-point tensors in a nest."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
