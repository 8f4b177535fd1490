"""One copy of a model's weights in host memory, in a memory file that all workers map."""

from __future__ import annotations

import contextlib
import logging
import os

import torch
from torch import Tensor, cuda

from ..wire.shared import Segment, TensorRef

log = logging.getLogger("sequence_parallel.worker")


class HostCopy:
    """The copy, mapped in this process.

    Args:
        file: empty; it is grown, and its descriptor closed. The memory lives as long as its mappings.
        size: in bytes, which all workers know alike.
    """

    def __init__(self, file: Segment, size: int):
        self.size = size
        os.ftruncate(file.fileno(), size)
        self._segment = Segment(file.name, os.dup(file.fileno()), size)
        file.close()
        self._segment.close()
        self._locked: tuple[int, torch.device] | None = None

    def bytes(self, start: int, stop: int) -> Tensor:
        return self._segment.tensor(TensorRef(self._segment.name, start, (stop - start,), "uint8"))

    def lock(self, device: torch.device) -> None:
        """Locks its pages, so that a CUDA device can fetch from it while it computes."""
        start = self.bytes(0, self.size).data_ptr()
        error = int(cuda.cudart().cudaHostRegister(start, self.size, 0))
        if error:
            with contextlib.suppress(RuntimeError):  # CUDA keeps the error; PyTorch would raise it at its next kernel
                torch.zeros(1, device=device).add_(1)
                cuda.synchronize(device)
            log.warning(
                "the copy of the weights in host memory cannot be page-locked (CUDA error %d): they will reach the"
                " device more slowly; is the memory full?",
                error,
            )
        else:
            self._locked = start, device

    def unlock(self) -> None:
        """Undoes `lock`, when the device has done what it was given."""
        if self._locked is not None:
            start, device = self._locked
            cuda.synchronize(device)
            cuda.cudart().cudaHostUnregister(start)
            self._locked = None
