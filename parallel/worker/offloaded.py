"""Weights in host memory, in one copy for all workers.

The copy is an anonymous memory file that every worker maps. Each writes an equal part of every tensor's rows, so the
checkpoint is read once, by all of them together. CPU workers compute with it where it is. A CUDA worker keeps what
belongs to no block on its device, and the blocks pass through (`passing`); for it the copy is page-locked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attention.traffic import Traffic
from ..wire.shared import Segment, lay_out
from .homes import Home, own, share_of_rows, watch_blocks
from .host_copy import HostCopy
from .passing import Cargo, Passing


class Offloaded(Home):
    """One copy for all ranks of the world.

    Args:
        file: an empty memory file that all ranks have; it is grown to what the model needs, which all know alike.
        rank, ranks: place among those that share the copy.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, file: Segment, rank: int, ranks: int):
        self._rank, self._ranks = rank, ranks
        blocks = watch_blocks(model, self)
        units = _units(model, blocks)
        names = [name for unit in units for name in unit]
        kept = [model.get_parameter(name) for name in names]
        places, self._size = lay_out(file.name, [(parameter.shape, parameter.dtype) for parameter in kept])
        self._copy = HostCopy(file, self._size)
        self._host = {name: self._copy.tensor(place) for name, place in zip(names, places, strict=True)}
        parameters = {name: own(model, name, host) for name, host in self._host.items()}
        self._passing: Passing | None = None
        if device.type == "cuda":
            offsets = {name: place.offset for name, place in zip(names, places, strict=True)}
            cargo = [self._cargo([(parameters[name], offsets[name]) for name in unit]) for unit in units]
            self._passing = Passing(cargo[:-1], cargo[-1], device)
            self._copy.lock(device)

    def share(self, name: str) -> tuple[Tensor, slice]:
        if self._passing is not None:
            self._passing.forget()
        host = self._host[name]
        rows = share_of_rows(len(host), self._rank, self._ranks)
        return host[rows], rows

    @property
    def nbytes(self) -> int:
        return self._size if self._passing is None else self._passing.nbytes

    @contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        if self._passing is not None:
            self._passing.begin()
        yield

    def bring(self, index: int) -> None:
        if self._passing is not None:
            self._passing.bring(index)

    def close(self) -> None:
        self._copy.unlock()

    def _cargo(self, parameters: list[tuple[nn.Parameter, int]]) -> Cargo:
        """What lies one after the other in the copy, at these offsets."""
        start = parameters[0][1] if parameters else 0
        stop = max((offset + parameter.nbytes for parameter, offset in parameters), default=0)
        return Cargo(self._copy.bytes(start, stop), [(parameter, offset - start) for parameter, offset in parameters])


def _units(model: nn.Module, blocks: list[nn.Module]) -> list[list[str]]:
    """Names of the parameters of each block, then of those of none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = [[names.pop(id(parameter)) for parameter in block.parameters()] for block in blocks]
    return [*units, list(names.values())]
