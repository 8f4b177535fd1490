"""Exceptions in a worker: their description for the host, release of their memory, and a test of the device."""

from __future__ import annotations

import traceback

import torch
import torch.distributed as dist

from ..errors import EngineError
from ..wire.messages import Failure

_OUT_OF_MEMORY = (
    ("out of memory",),
    ("can't allocate memory",),
    ("cannot allocate memory",),
    ("cublas_status_alloc_failed",),
    ("cublas_status_not_initialized", "cublascreate"),
)
"""Words that together identify an out-of-memory error of CUDA, cuBLAS, PyTorch or the system, whatever its class."""


def describe(error: BaseException, attached: bool) -> Failure:
    """Describes an exception as plain data.

    Args:
        attached: whether this rank has mapped the shared memory that was sent with the operation.

    Returns:
        The failure. `resumable` is False if a collective itself failed, which may have begun on some ranks only, or if
        shared memory is missing.
    """
    text = str(error).lower()
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    out_of_memory = out_of_memory or any(all(word in text for word in words) for words in _OUT_OF_MEMORY)
    return Failure(
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        expected=isinstance(error, EngineError),
        out_of_memory=out_of_memory,
        resumable=attached and not isinstance(error, dist.DistError),
    )


def let_go(error: BaseException) -> None:
    """Clears the traceback frames of the exception and of its causes, which would keep tensors alive."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            pending += [each.__cause__, each.__context__]


def probe(device: torch.device) -> None:
    """Waits for the device's queued work, then allocates a little memory and runs two kernels there.

    After an illegal access every call in the CUDA context fails. The host limits how long it waits for this probe.

    Raises:
        RuntimeError: the device no longer computes, or computes wrong results.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = torch.arange(1024.0, device=device).mul(2).sum().item()  # every partial sum is exact in fp32
    if total != 1023 * 1024:
        raise RuntimeError(f"{device} adds up wrongly: {total}")
