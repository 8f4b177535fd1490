"""Where the weights of a network under a split plan are: in whole, in parts (`sharded`), or in host memory
(`offloaded`).

Its blocks are run by code that is not ours: hooks bring a block's weights just before it runs, and everything is
handled as bytes (`packed`), so that dtypes may differ inside a block, and quantised weights stay as the file has them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention.traffic import Traffic
from ..errors import CheckpointError
from ..wire.plain import plain_tensors
from .packed import Packed, Weight

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total; may raise StepCancelled."""


class Home(ABC):
    """The weights of one network on one rank.

    Attributes:
        skipping: whether a cache skips the block whose turn it is: nobody needs its weights; the same answer on all
            ranks of a sequence.
    """

    skipping: Callable[[], bool] = staticmethod(lambda: False)

    @abstractmethod
    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Replaces a weight by what another one of its kind consists of, which may be kept as it is; all ranks do.

        Raises:
            CheckpointError: there is no such weight, or it does not consist of such tensors.
        """

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


class MakeHome(Protocol):
    """Takes the weights that belong to no block, each block with its weights, this rank's device, and whom to tell."""

    def __call__(
        self,
        rest: Sequence[Weight],
        blocks: Mapping[nn.Module, Sequence[Weight]],
        device: torch.device,
        progress: Progress,
    ) -> Home: ...


class Replicated(Home):
    """A whole copy on this rank's device. CPU ranks compute with the mapped file, which is in memory once for all of
    them; only what is kept in another dtype than the file's is copied."""

    def __init__(
        self,
        rest: Sequence[Weight],
        blocks: Mapping[nn.Module, Sequence[Weight]],
        device: torch.device,
        progress: Progress,
    ):
        self._device = device
        self._weights = {weight.name: weight for weight in (*rest, *(w for block in blocks.values() for w in block))}
        for weight in told(self._weights.values(), progress):
            self.put(weight.name, plain_tensors(weight.value))

    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        weight = known(self._weights, name)
        weight.install([piece.to(self._device) for piece in weight.stored(pieces)])

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())


class Units:
    """A network's weights by what travels together: each block, and what belongs to none.

    Args:
        bring: called with a block's number just before it runs.
    """

    def __init__(
        self, rest: Sequence[Weight], blocks: Mapping[nn.Module, Sequence[Weight]], bring: Callable[[int], None]
    ):
        self.blocks = [Packed(weights) for weights in blocks.values()]
        self.rest = Packed(rest)
        self._at = {weight.name: (number, weight) for number, unit in enumerate(self.all) for weight in unit.weights}
        self._handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(partial(_brought, bring, number)) for number, block in enumerate(blocks)
        ]

    @property
    def all(self) -> list[Packed]:
        """The blocks, then the rest."""
        return [*self.blocks, self.rest]

    @property
    def weights(self) -> list[Weight]:
        return [weight for unit in self.all for weight in unit.weights]

    def find(self, name: str) -> tuple[int, Weight]:
        """A weight, and the place in `all` of what it is part of.

        Raises:
            CheckpointError: there is no such weight.
        """
        return known(self._at, name)

    def close(self) -> None:
        """Takes the hooks out."""
        for handle in self._handles:
            handle.remove()


def _brought(bring: Callable[[int], None], number: int, module: nn.Module, args: Any) -> None:
    bring(number)


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


def told(weights: Iterable[Weight], progress: Progress) -> Iterable[Weight]:
    """The weights; each has been dealt with when the next one is asked for."""
    weights = list(weights)
    total, done = sum(weight.nbytes for weight in weights), 0
    for weight in weights:
        yield weight
        done += weight.nbytes
        progress(done, total)


def known(weights: Mapping[str, Any], name: str) -> Any:
    """What is there under a weight's name.

    Raises:
        CheckpointError: nothing is.
    """
    if name not in weights:
        raise CheckpointError(f"the network has no weight {name!r}")
    return weights[name]
