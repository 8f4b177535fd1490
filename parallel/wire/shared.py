"""Shared memory that cannot be left behind, and the tensors in it.

A segment is an anonymous memory file (memfd): it has no name, so there is nothing to unlink; the kernel frees it when
the last process that holds it ends, however it ends. It does not count against the size of /dev/shm either, which is
64 MB in a default container.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import reprlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; tensors start on a cache line."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip


_MOST_DIMS = 64
"""PyTorch's own limit in most operations."""
_MOST_BYTES = 2**63 - 1
"""PyTorch counts elements and bytes in signed 64-bit integers."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies in a segment: plain data, so that it can be put in a message.

    Raises:
        ValueError: no tensor has such a dtype, shape or offset.
    """

    segment: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r} cannot travel through shared memory")
        if self.offset < 0 or len(self.shape) > _MOST_DIMS or any(dim < 0 for dim in self.shape):
            raise ValueError(
                f"offset {reprlib.repr(self.offset)}, shape {reprlib.repr(self.shape)}: they are at least 0, in at most"
                f" {_MOST_DIMS} dims"
            )
        # Strides count elements, also of a tensor without any.
        if self.offset + prod(max(1, dim) for dim in self.shape) * _DTYPES[self.dtype].itemsize > _MOST_BYTES:
            raise ValueError(f"offset {reprlib.repr(self.offset)}, shape {reprlib.repr(self.shape)}: too large")


class Segment:
    """A piece of shared memory, mapped in this process."""

    def __init__(self, name: str, fd: int, size: int):
        """Maps `size` bytes of `fd`, which the segment owns from here on.

        Raises:
            ValueError: the file has fewer bytes, or cannot be mapped; `fd` is closed then.
        """
        self.name = name
        self.size = size
        self._fd = fd
        try:
            # Pages behind the end of a file can be mapped, and kill the process that touches them.
            if not 0 < size <= os.fstat(fd).st_size:
                raise ValueError(f"it has {os.fstat(fd).st_size} bytes")
            self._map = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            self.close()
            raise ValueError(f"no {size} bytes of shared memory for segment {name!r}: {error}") from error
        self._loans: list[weakref.ref[Any]] = []

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """A new, zeroed segment of at least `size` bytes."""
        size = max(ALIGNMENT, size)
        fd = os.memfd_create(f"sequence-parallel:{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(name, fd, size)

    def fileno(self) -> int:
        return self._fd

    def words(self) -> memoryview:
        """The segment as 64-bit integers."""
        return memoryview(self._map).cast("q")

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor at `ref`: it aliases the shared memory and keeps the mapping alive.

        Raises:
            ValueError: `ref` reaches outside the segment.
        """
        return self._on(self._map, ref)

    def lend(self, ref: TensorRef) -> Tensor:
        """As `tensor`, and the segment counts as `lent` until the tensor and every view of it have gone.

        Raises:
            ValueError: `ref` reaches outside the segment.
        """
        owner = (ctypes.c_byte * self.size).from_buffer(self._map)  # unlike an mmap it can be watched
        self._loans.append(weakref.ref(owner))
        return self._on(owner, ref)

    @property
    def lent(self) -> bool:
        self._loans = [loan for loan in self._loans if loan() is not None]
        return bool(self._loans)

    def _on(self, buffer: Any, ref: TensorRef) -> Tensor:
        if ref.offset < 0 or ref.offset + ref.nbytes > self.size:
            raise ValueError(f"{ref} reaches outside segment {self.name!r} of {self.size} bytes")
        dtype = _DTYPES[ref.dtype]
        if not prod(ref.shape):
            return torch.empty(ref.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype, count=prod(ref.shape), offset=ref.offset).view(ref.shape)

    def clear(self) -> None:
        """Gives the memory of all of it back to the system; what lies in it is lost."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Drops this process's descriptor; the mapping goes when the last tensor on it goes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` → `float32`.

    Raises:
        ValueError: the dtype cannot travel through shared memory.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"a {name} tensor cannot travel through shared memory; allowed are {', '.join(_DTYPES)}")
    return name


def lay_out(segment: str, tensors: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[TensorRef], int]:
    """Places tensors of the given shapes and dtypes one after the other; returns their places and the bytes needed."""
    refs, offset = [], 0
    for shape, dtype in tensors:
        ref = TensorRef(segment, offset, tuple(shape), dtype_name(dtype))
        refs.append(ref)
        offset += -(-ref.nbytes // ALIGNMENT) * ALIGNMENT
    return refs, offset
