"""Weights in host memory, in one copy for all workers.

The copy is an anonymous memory file that every worker maps. Each writes an equal part of every tensor's rows, so the
checkpoint is read once, by all of them together. CPU workers compute with it where it is. A CUDA worker keeps what
belongs to no block on its device, and the blocks pass through (`passing`); for it the copy is page-locked.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, cuda, nn

from ..attention.traffic import Traffic
from ..wire.shared import Segment, TensorRef, lay_out
from .homes import Home, own, share_of_rows, watch_blocks
from .passing import Cargo, Passing

log = logging.getLogger("sequence_parallel.worker")


class Offloaded(Home):
    """One copy for all ranks of the world.

    Args:
        file: an empty memory file that all ranks have; it is grown to what the model needs, which all know alike.
        rank, ranks: place among those that share the copy.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, file: Segment, rank: int, ranks: int):
        self._device, self._rank, self._ranks = device, rank, ranks
        blocks = watch_blocks(model, self)
        units = _units(model, blocks)
        names = [name for unit in units for name in unit]
        kept = [model.get_parameter(name) for name in names]
        places, self._size = lay_out(file.name, [(parameter.shape, parameter.dtype) for parameter in kept])
        self._copy = _grown(file, self._size)
        self._host = {name: self._copy.tensor(place) for name, place in zip(names, places, strict=True)}
        parameters = {name: own(model, name, host) for name, host in self._host.items()}
        self._passing: Passing | None = None
        self._locked: int | None = None
        if device.type == "cuda":
            offsets = {name: place.offset for name, place in zip(names, places, strict=True)}
            cargo = [self._cargo([(parameters[name], offsets[name]) for name in unit]) for unit in units]
            self._passing = Passing(cargo[:-1], cargo[-1], device)
            self._lock_pages()

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
        if self._locked is not None:
            cuda.synchronize(self._device)
            cuda.cudart().cudaHostUnregister(self._locked)
            self._locked = None

    def _bytes(self, start: int, stop: int) -> Tensor:
        return self._copy.tensor(TensorRef(self._copy.name, start, (stop - start,), "uint8"))

    def _cargo(self, parameters: list[tuple[nn.Parameter, int]]) -> Cargo:
        """What lies one after the other in the copy, at these offsets."""
        start = parameters[0][1] if parameters else 0
        stop = max((offset + parameter.nbytes for parameter, offset in parameters), default=0)
        return Cargo(self._bytes(start, stop), [(parameter, offset - start) for parameter, offset in parameters])

    def _lock_pages(self) -> None:
        """So that the device can fetch from the copy while it computes."""
        start = self._bytes(0, self._size).data_ptr()
        error = int(cuda.cudart().cudaHostRegister(start, self._size, 0))
        if error:
            with contextlib.suppress(RuntimeError):  # CUDA keeps the error; PyTorch would raise it at its next kernel
                torch.zeros(1, device=self._device).add_(1)
                cuda.synchronize(self._device)
            log.warning(
                "the copy of the weights in host memory cannot be page-locked (CUDA error %d): they will reach the"
                " device more slowly; is the memory full?",
                error,
            )
        else:
            self._locked = start


def _units(model: nn.Module, blocks: list[nn.Module]) -> list[list[str]]:
    """Names of the parameters of each block, then of those of none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = [[names.pop(id(parameter)) for parameter in block.parameters()] for block in blocks]
    return [*units, list(names.values())]


def _grown(file: Segment, size: int) -> Segment:
    """The file with room for `size` bytes. No descriptor of it is kept; the memory lives as long as its mappings."""
    os.ftruncate(file.fileno(), size)
    grown = Segment(file.name, os.dup(file.fileno()), size)
    file.close()
    grown.close()
    return grown
