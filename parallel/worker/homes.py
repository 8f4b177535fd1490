"""Storage of a network's weights under a split plan: replicated, sharded (`sharded`), or in host memory (`offloaded`).

The network's own code runs its blocks, so hooks provide a block's weights just before it runs. Weights are handled as
bytes (`packed`), so that dtypes may differ inside a block, and quantised weights keep the file's format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.traffic import Traffic
from ..errors import CheckpointError
from ..wire.plain import plain_tensors
from .packed import Packed, QuantisedWeight, Weight

Progress = Callable[[int, int], None]
"""Callback that takes the bytes done and the total bytes; may raise StepCancelled."""
Blocks = Mapping[nn.Module, Sequence[Weight]]
"""Maps each block to its weights."""


class Home(ABC):
    """The weights of one network on one rank.

    Args:
        rest: the weights that belong to no block.
        blocks: the blocks and their weights.
        device: this rank's device.

    Attributes:
        skipping: returns whether a cache skips the current block, so that its weights are not needed; the same result
            on all ranks of a sequence.
    """

    skipping: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, rest: Sequence[Weight], blocks: Blocks, device: torch.device):
        self._device = device
        self._units = [*map(Packed, blocks.values()), Packed(rest)]
        """Units of transfer: one for each block, then one for the weights outside the blocks."""
        self._at = {weight.name: (number, weight) for number, unit in enumerate(self._units) for weight in unit.weights}

    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Replaces a weight by `pieces`, the plain tensors of a compatible weight. Called on all ranks.

        The pieces may be kept without a copy.

        Raises:
            CheckpointError: there is no such weight, or the pieces do not fit it.
        """
        if name not in self._at:
            raise CheckpointError(f"the network has no weight {name!r}")
        self._put(*self._at[name], pieces)

    def patch(self, name: str, patches: list[Any]) -> None:
        """Sets the patches that a weight's layer adds to it (`QuantisedWeight.patches`); its bytes do not change.

        Raises:
            CheckpointError: there is no such weight, or it is not quantised.
        """
        _, weight = self._at.get(name, (0, None))
        if not isinstance(weight, QuantisedWeight):
            raise CheckpointError(f"the network has no quantised weight {name!r}")
        weight.patches = patches
        weight.module._parameters[weight.leaf].patches = patches  # type: ignore[union-attr]

    @abstractmethod
    def _put(self, number: int, weight: Weight, pieces: Sequence[Tensor]) -> None:
        """Replaces a weight of unit `number`."""

    def _put_all(self, progress: Progress) -> Iterator[Weight]:
        """Puts the file's values, and yields each weight after its `put` for the caller to finish before the next."""
        weights = [weight for _, weight in self._at.values()]
        total, done = sum(weight.nbytes for weight in weights), 0
        for weight in weights:
            self.put(weight.name, plain_tensors(weight.value))
            yield weight
            done += weight.nbytes
            progress(done, total)

    def in_use(self, traffic: Traffic | None = None) -> AbstractContextManager[None]:
        """Returns a context in which the network can run; all ranks of a sequence enter it together. `traffic` records
        the time spent waiting for weights of other ranks."""
        return nullcontext()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of weights on this rank's device between calls; on a CPU including memory shared with other ranks."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Releases resources before the network is dropped."""


MakeHome = Callable[[Sequence[Weight], Blocks, torch.device, Progress], Home]
"""Factory of a `Home`; takes the arguments of `Home` and a progress callback."""


class Replicated(Home):
    """A whole copy on this rank's device. CPU ranks compute with the mapped file, which is in memory once for all of
    them; only weights kept in a dtype other than the file's are copied."""

    def __init__(self, rest: Sequence[Weight], blocks: Blocks, device: torch.device, progress: Progress):
        super().__init__(rest, blocks, device)
        for _ in self._put_all(progress):
            pass

    def _put(self, number: int, weight: Weight, pieces: Sequence[Tensor]) -> None:
        weight.install([piece.to(self._device) for piece in weight.stored(pieces)])

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for _, weight in self._at.values())


class Brought(Home):
    """Base of homes that provide a block's weights just before it runs, from bytes of which each rank writes a part."""

    def __init__(self, rest: Sequence[Weight], blocks: Blocks, device: torch.device):
        super().__init__(rest, blocks, device)
        self._order = Order(len(blocks))
        self._handles = [
            block.register_forward_pre_hook(partial(self._before, number)) for number, block in enumerate(blocks)
        ]

    def _write_all(self, parts: Sequence[tuple[Tensor, int]], progress: Progress) -> None:
        """Writes the file's values.

        Args:
            parts: for each unit, the bytes that this rank writes, and their offset in the unit.
        """
        self._parts = parts
        for weight in self._put_all(progress):
            weight.clear()

    def _put(self, number: int, weight: Weight, pieces: Sequence[Tensor]) -> None:
        part, first = self._parts[number]
        self._units[number].write(weight, pieces, part, first)

    def _before(self, number: int, module: nn.Module, args: Any) -> None:
        if not self.skipping():
            self._bring(number, self._order.after(number))

    @abstractmethod
    def _bring(self, number: int, following: int | None) -> None:
        """Provides the weights of block `number`; `following`, if any, will probably run next."""

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Order:
    """Predicts the next block from the order of earlier calls, since block lists may alternate; at first by number."""

    def __init__(self, blocks: int):
        self._count = blocks
        self._next: dict[int, int] = {}
        self._last: int | None = None

    def begin(self) -> None:
        """Starts a new call of the network."""
        self._last = None

    def after(self, number: int) -> int | None:
        """Records that block `number` runs now; returns the block that will probably follow, or None after the last."""
        if self._last is not None:
            self._next[self._last] = number
        self._last = number
        following = self._next.get(number, number + 1)
        return following if following < self._count else None


def by_block(
    weights: Sequence[Weight], blocks: Sequence[nn.Module]
) -> tuple[list[Weight], dict[nn.Module, list[Weight]]]:
    """Returns the weights that belong to no block, and the weights of each block."""
    block_of = {module: block for block in blocks for module in block.modules()}
    found: dict[nn.Module, list[Weight]] = {block: [] for block in blocks}
    rest: list[Weight] = []
    for weight in weights:
        block = block_of.get(weight.module)
        (rest if block is None else found[block]).append(weight)
    return rest, found
