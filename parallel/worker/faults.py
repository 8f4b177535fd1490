"""What a worker says of an exception, what it frees after one, and how it shows that its device still computes."""

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
"""Words of errors of CUDA's, cuBLAS's, PyTorch's and the system's allocators, whatever their class."""


def describe(error: BaseException, attached: bool) -> Failure:
    """The exception as plain data.

    Args:
        attached: whether this rank has mapped the shared memory that came with the operation.

    Returns:
        `resumable` is false where a collective itself failed, which may have begun on some ranks only, or where shared
        memory is missing.
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
    """Clears the frames through which the exception and its causes came, which keep their tensors alive."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            pending += [each.__cause__, each.__context__]


def probe(device: torch.device) -> None:
    """Waits for what the device has been given, allocates a little and runs two kernels there.

    A CUDA context that an illegal access has broken fails every call from then on. The host limits how long it waits.

    Raises:
        RuntimeError: the device does not compute any more, or wrongly.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = torch.arange(1024.0, device=device).mul(2).sum().item()  # every partial sum is exact in fp32
    if total != 1023 * 1024:
        raise RuntimeError(f"{device} adds up wrongly: {total}")
