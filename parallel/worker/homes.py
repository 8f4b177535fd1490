"""Where a resident model's parameters are, and how they come to the device for the time of their use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attention.traffic import Traffic


class Home(ABC):
    """The parameters of one model on one rank.

    Made from a model on the meta device, whose parameters have the shapes and dtypes in which they are to be kept. It
    is filled by `share`; `in_use` surrounds every step. Parameters keep their names and their shapes.
    """

    @abstractmethod
    def share(self, name: str) -> tuple[Tensor, slice]:
        """Where this rank is to write its part of a parameter, and which rows of the parameter that is."""

    def in_use(self, traffic: Traffic | None = None) -> AbstractContextManager[None]:
        """Inside, the network can run: on all ranks of a sequence together. `traffic` times the waits for weights that
        other ranks have."""
        return nullcontext()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of weights on this rank's device, between steps; the one host copy counts on CPU ranks."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Before the model goes."""


class MakeHome(Protocol):
    """Takes the model and this rank's device."""

    def __call__(self, model: nn.Module, device: torch.device) -> Home: ...


class Replicated(Home):
    """A whole copy on this rank's device."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model, device

    def share(self, name: str) -> tuple[Tensor, slice]:
        parameter = self._model.get_parameter(name)
        if parameter.is_meta:
            parameter = own(self._model, name, torch.empty_like(parameter, device=self._device))
        return parameter.data, slice(None)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self._model.parameters())


class BlockSource(Protocol):
    """Makes a block's parameters usable just before it runs."""

    def bring(self, index: int) -> None:
        """Block `index` is about to run, and those before it have been launched; on all ranks of a sequence alike."""


class BlockList(nn.ModuleList):
    """A list of a network's blocks that brings each one's weights when it is taken out of the list.

    So the code that runs blocks, one after the other, need not know where the weights are. A block can be used until
    the next one is taken.
    """

    source: BlockSource
    first: int
    """Index of this list's first block among the blocks of all lists."""

    def __iter__(self) -> Iterator[nn.Module]:
        for i, block in enumerate(self._modules.values()):
            self.source.bring(self.first + i)
            yield block

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]  # slices are not needed
        index = range(len(self))[index]
        self.source.bring(self.first + index)
        return self._modules[str(index)]


def watch_blocks(model: nn.Module, source: BlockSource) -> list[nn.Module]:
    """Has `source` bring the blocks of the model: what its lists hold, in the order in which they run.

    Only lists that belong to the model itself count: what a diffusers module calls of its own is not ours to time.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if type(child) is nn.ModuleList:
            child.__class__ = BlockList
            child.source, child.first = source, len(blocks)  # type: ignore[assignment]
            blocks += child._modules.values()
    return blocks


def own(model: nn.Module, name: str, tensor: Tensor) -> nn.Parameter:
    """Makes `tensor` the parameter of that name."""
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    model.get_submodule(path)._parameters[leaf] = parameter
    return parameter


def share_of_rows(count: int, rank: int, ranks: int) -> slice:
    """The rows of `rank`, as FSDP2 cuts them: equal parts but for the last ones, which may be smaller or empty."""
    size = -(-count // ranks)
    return slice(min(rank * size, count), min((rank + 1) * size, count))
