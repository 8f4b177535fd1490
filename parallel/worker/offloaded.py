"""A network's weights in host memory, in one copy for all workers.

The copy is an anonymous memory file that every worker maps. Each worker writes an equal part of every block, so the
checkpoint is read once, by all workers together. CPU workers compute with the copy in place. A CUDA worker keeps the
weights outside the blocks on its device and streams the blocks through it (`passing`), from the page-locked copy.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, cuda

from ..attention.traffic import Traffic
from ..wire.shared import Segment, TensorRef
from .homes import Blocks, Brought, Progress
from .packed import Weight
from .passing import Passing

log = logging.getLogger("sequence_parallel.worker")


class Offloaded(Brought):
    """One copy for all ranks of the world. CPU ranks compute with it in place; CUDA ranks stream blocks from it.

    Args:
        file: an empty memory file that all ranks have; it is grown, and its descriptor closed. The memory lives as long
            as its mappings.
        rank, ranks: this rank and the number of ranks that share the copy; each writes an equal part of it.
    """

    def __init__(
        self,
        rest: Sequence[Weight],
        blocks: Blocks,
        device: torch.device,
        progress: Progress,
        *,
        file: Segment,
        rank: int,
        ranks: int,
    ):
        super().__init__(rest, blocks, device)
        ends = list(accumulate(unit.size for unit in self._units))
        self._copy = _grown(file, max(1, ends[-1]))
        hosts = [self._copy[end - unit.size : end] for unit, end in zip(self._units, ends, strict=True)]
        cuts = [[len(host) * part // ranks for part in (rank, rank + 1)] for host in hosts]
        self._passing: Passing | None = None
        self._locked = False
        self._write_all([(host[first:last], first) for host, (first, last) in zip(hosts, cuts, strict=True)], progress)
        if device.type == "cuda":
            self._passing = Passing(self._units, hosts, device)
            self._locked = _lock(self._copy, device)
        else:
            for unit, host in zip(self._units, hosts, strict=True):
                unit.land(host)

    def _put(self, number: int, weight: Weight, pieces: Sequence[Tensor]) -> None:
        if self._passing is not None:
            self._passing.forget()
        super()._put(number, weight, pieces)

    @property
    def nbytes(self) -> int:
        return len(self._copy) if self._passing is None else self._passing.nbytes

    @contextlib.contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        if self._passing is not None:
            self._passing.begin()
        yield

    def close(self) -> None:
        super().close()
        if self._locked:
            cuda.synchronize(self._device)  # copies may still be in flight
            cuda.cudart().cudaHostUnregister(self._copy.data_ptr())
            self._locked = False

    def _bring(self, number: int, following: int | None) -> None:
        if self._passing is not None:
            self._passing.bring(number, following)


def _grown(file: Segment, size: int) -> Tensor:
    """Grows the file to `size` bytes and returns them as one tensor, [size] uint8."""
    os.ftruncate(file.fileno(), size)
    whole = Segment(file.name, os.dup(file.fileno()), size)
    file.close()
    whole.close()
    return whole.tensor(TensorRef(file.name, 0, (size,), "uint8"))


def _lock(copy: Tensor, device: torch.device) -> bool:
    """Page-locks the copy, so that a CUDA device can copy from it while it computes. Returns whether that succeeded."""
    error = int(cuda.cudart().cudaHostRegister(copy.data_ptr(), len(copy), 0))
    if error:
        with contextlib.suppress(RuntimeError):  # CUDA keeps the error; PyTorch would raise it at its next kernel
            torch.zeros(1, device=device).add_(1)
            cuda.synchronize(device)
        log.warning(
            "the copy of the weights in host memory cannot be page-locked (CUDA error %d): they will reach the"
            " device more slowly; is the memory full?",
            error,
        )
    return not error
