"""Where the weights of a network under a split plan are: in whole, in parts (`sharded`), or in host memory
(`offloaded`).

Its blocks are run by code that is not ours: hooks bring a block's weights just before it runs, and everything is
handled as bytes (`packed`), so that dtypes may differ inside a block, and quantised weights stay as the file has them.
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
"""Called with bytes done and bytes in total; may raise StepCancelled."""
Blocks = Mapping[nn.Module, Sequence[Weight]]
"""Each block with its weights."""


class Home(ABC):
    """The weights of one network on one rank.

    Args:
        rest: the weights that belong to no block.
        blocks: the others.
        device: this rank's.

    Attributes:
        skipping: whether a cache skips the block whose turn it is: nobody needs its weights; the same answer on all
            ranks of a sequence.
    """

    skipping: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, rest: Sequence[Weight], blocks: Blocks, device: torch.device):
        self._device = device
        self._units = [*map(Packed, blocks.values()), Packed(rest)]
        """What travels together: each block, then what belongs to none."""
        self._at = {weight.name: (number, weight) for number, unit in enumerate(self._units) for weight in unit.weights}

    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Replaces a weight by what another one of its kind consists of, which may be kept as it is; all ranks do.

        Raises:
            CheckpointError: there is no such weight, or it does not consist of such tensors.
        """
        if name not in self._at:
            raise CheckpointError(f"the network has no weight {name!r}")
        self._put(*self._at[name], pieces)

    def patch(self, name: str, patches: list[Any]) -> None:
        """Has a weight's layer add patches to it (`QuantisedWeight.patches`); its bytes stay.

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
        """Replaces a weight of the unit of this number."""

    def _put_all(self, progress: Progress) -> Iterator[Weight]:
        """Puts the file's values; each weight has been dealt with when the next one is asked for."""
        weights = [weight for _, weight in self._at.values()]
        total, done = sum(weight.nbytes for weight in weights), 0
        for weight in weights:
            self.put(weight.name, plain_tensors(weight.value))
            yield weight
            done += weight.nbytes
            progress(done, total)

    def in_use(self, traffic: Traffic | None = None) -> AbstractContextManager[None]:
        """Inside, the network can run: on all ranks of a sequence together. `traffic` times the waits for weights that
        other ranks have."""
        return nullcontext()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of weights on this rank's device, between calls; on a CPU what is shared with other ranks counts."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Before the network goes."""


MakeHome = Callable[[Sequence[Weight], Blocks, torch.device, Progress], Home]
"""Takes the first arguments of `Home`, and whom to tell."""


class Replicated(Home):
    """A whole copy on this rank's device. CPU ranks compute with the mapped file, which is in memory once for all of
    them; only what is kept in another dtype than the file's is copied."""

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
    """Blocks whose weights are brought just before they run, from bytes of which this rank writes a part."""

    def __init__(self, rest: Sequence[Weight], blocks: Blocks, device: torch.device):
        super().__init__(rest, blocks, device)
        self._order = Order(len(blocks))
        self._handles = [
            block.register_forward_pre_hook(partial(self._before, number)) for number, block in enumerate(blocks)
        ]

    def _write_all(self, parts: Sequence[tuple[Tensor, int]], progress: Progress) -> None:
        """Takes the file's values.

        Args:
            parts: of each unit, the bytes that this rank writes, and at which of the unit's they begin.
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
        """Has the weights of a block there; `following`, if any, will probably run next."""

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Order:
    """Which block runs after which, as seen: lists may take turns. Before the first time, by number."""

    def __init__(self, blocks: int):
        self._count = blocks
        self._next: dict[int, int] = {}
        self._last: int | None = None

    def begin(self) -> None:
        """Before a call."""
        self._last = None

    def after(self, number: int) -> int | None:
        """Block `number` runs now; the one that will probably follow, or None behind the last."""
        if self._last is not None:
            self._next[self._last] = number
        self._last = number
        following = self._next.get(number, number + 1)
        return following if following < self._count else None


def by_block(
    weights: Sequence[Weight], blocks: Sequence[nn.Module]
) -> tuple[list[Weight], dict[nn.Module, list[Weight]]]:
    """The weights that belong to no block, and those of each block."""
    block_of = {module: block for block in blocks for module in block.modules()}
    found: dict[nn.Module, list[Weight]] = {block: [] for block in blocks}
    rest: list[Weight] = []
    for weight in weights:
        block = block_of.get(weight.module)
        (rest if block is None else found[block]).append(weight)
    return rest, found
