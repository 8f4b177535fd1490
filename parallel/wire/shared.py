"""Shared memory that cannot leak, and the tensors in it.

A segment is an anonymous memory file (memfd): it has no name, so there is nothing to unlink; the kernel frees it when
the last process that holds it ends, in whatever way. It does not count against the size of /dev/shm either, which is
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
"""Alignment of tensors in bytes: one cache line."""

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
    """Location of a tensor in a segment, as plain data that can be part of a message.

    Raises:
        ValueError: the dtype is not supported, or the shape or offset is out of range.
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
        # Strides count elements even if a tensor has none, so dims of 0 count as 1.
        if self.offset + prod(max(1, dim) for dim in self.shape) * _DTYPES[self.dtype].itemsize > _MOST_BYTES:
            raise ValueError(f"offset {reprlib.repr(self.offset)}, shape {reprlib.repr(self.shape)}: too large")


class Segment:
    """Region of shared memory, mapped in this process."""

    def __init__(self, name: str, fd: int, size: int):
        """Maps `size` bytes of `fd`, and takes ownership of it.

        Raises:
            ValueError: the file has fewer bytes, `size` is not positive, or mapping fails; `fd` is closed.
        """
        self.name = name
        self.size = size
        self._fd = fd
        try:
            # Pages behind the end of a file can be mapped, but accessing them kills the process (SIGBUS).
            if not 0 < size <= os.fstat(fd).st_size:
                raise ValueError(f"it has {os.fstat(fd).st_size} bytes")
            self._map = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            self.close()
            raise ValueError(f"no {size} bytes of shared memory for segment {name!r}: {error}") from error
        self._loans: list[weakref.ref[Any]] = []

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """Creates a zeroed segment of at least `size` bytes."""
        size = max(ALIGNMENT, size)
        fd = os.memfd_create(f"sequence-parallel:{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(name, fd, size)

    def fileno(self) -> int:
        return self._fd

    def words(self) -> memoryview:
        """Returns a view of the segment as signed 64-bit integers."""
        return memoryview(self._map).cast("q")

    def tensor(self, ref: TensorRef) -> Tensor:
        """Returns the tensor at `ref`, which aliases the shared memory and keeps the mapping alive.

        Raises:
            ValueError: `ref` reaches outside the segment.
        """
        return self._on(self._map, ref)

    def lend(self, ref: TensorRef) -> Tensor:
        """Returns the tensor at `ref`; the segment counts as `lent` until the tensor and all views of it are freed.

        Raises:
            ValueError: `ref` reaches outside the segment.
        """
        owner = (ctypes.c_byte * self.size).from_buffer(self._map)  # each loan has its own owner; the mmap outlives it
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
        """Returns all of its memory to the system; its contents are lost."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Closes this process's descriptor; the mapping is removed with the last tensor on it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype, e.g. `float32` for `torch.float32`.

    Raises:
        ValueError: tensors of this dtype cannot be shared.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"a {name} tensor cannot travel through shared memory; allowed are {', '.join(_DTYPES)}")
    return name


def lay_out(segment: str, tensors: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[TensorRef], int]:
    """Places tensors of these shapes and dtypes one after another; returns their locations and the bytes needed."""
    refs, offset = [], 0
    for shape, dtype in tensors:
        ref = TensorRef(segment, offset, tuple(shape), dtype_name(dtype))
        refs.append(ref)
        offset += -(-ref.nbytes // ALIGNMENT) * ALIGNMENT
    return refs, offset
