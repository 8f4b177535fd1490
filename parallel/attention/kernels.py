"""Attention kernels behind one interface. All tensors are [B, H, S, D]; not causal, and only `with_lse` takes a mask.

A kernel is called as `kernel(q, k, v) -> out`. For a ring it also provides `with_lse`, which returns the result and the
log-sum-exp of each query's scores, by which partial results over different keys are merged.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import KERNEL_CAPABILITY
from ..errors import UnsupportedError

log = logging.getLogger("sequence_parallel")

_HALF = (torch.float16, torch.bfloat16)


class Kernel(ABC):
    """Local attention of this rank's queries to the keys that it is called with."""

    name: ClassVar[str]
    no_lse: str = ""
    """Reason why `with_lse` is not available; empty if it is."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes attention; the result has q's shape."""

    @abstractmethod
    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes attention and the log-sum-exp [B, H, S_q] of the scaled scores, in fp32.

        Args:
            mask: additive and finite (all keys of a row may be masked), [B or 1, H or 1, S_q or 1, S_k].

        Raises:
            UnsupportedError: a mask was passed, and this kernel supports none.
        """

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k, v, where k and v are a part of the keys over which `out` and `lse` were taken.

        Raises:
            UnsupportedError: this kernel has no such backward on this device.
        """
        raise UnsupportedError(f"gradients through ring attention are not available with the kernel {self.name!r}")


class Sdpa(Kernel):
    """PyTorch's own SDPA kernels; on CUDA, PyTorch chooses among `backends`, in this order."""

    name = "sdpa"

    def __init__(self, backends: Sequence[SDPBackend] | None = None):
        self._backends = list(backends) if backends else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        allowed = sdpa_kernel(self._backends, set_priority=True) if self._backends else contextlib.nullcontext()
        with allowed:
            return F.scaled_dot_product_attention(q, k, v)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if q.device.type == "cpu":
            mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
        if mask is None and q.dtype in _HALF and torch.cuda.get_device_capability(q.device) >= KERNEL_CAPABILITY:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        if mask is not None:  # the kernel reads whole groups of 16 keys
            keys = k.shape[2]
            mask = F.pad(mask, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
        return out, lse[..., : q.shape[2]]  # padded to a multiple of 32

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if q.device.type != "cpu":
            return super().backward(grad, q, k, v, out, lse)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


_NO_CUDNN_PLAN = (
    "no execution plans support the graph",
    "no valid execution plans built",
    "no valid engine configs",
    "cudnn_status_not_supported",
)
"""Texts, in lower case, by which cuDNN reports that it has no kernel: messages of cudnn-frontend's `plans.h`, which
PyTorch raises as "cuDNN Frontend error: …" while it builds the graph (aten/src/ATen/native/cudnn/MHA.cpp), and the
status "CUDNN_STATUS_NOT_SUPPORTED". No kernel has run by then."""


def says_no_kernel(error: RuntimeError) -> bool:
    """Returns True if cuDNN has no kernel for these tensors; any other error may be a device error, to be re-raised."""
    text = str(error).lower()
    return "cudnn" in text and any(words in text for words in _NO_CUDNN_PLAN)


class Auto(Sdpa):
    """`Sdpa` that drops cuDNN once cuDNN was selected and had no kernel.

    Each rank decides this by itself: it changes rounding, but no exchange.
    """

    name = "auto"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            return super().__call__(q, k, v)
        except RuntimeError as error:
            if self._backends is None or SDPBackend.CUDNN_ATTENTION not in self._backends or not says_no_kernel(error):
                raise
            log.warning("attention auto: cuDNN has no kernel for this model (%s); going on without it", error)
            self._backends.remove(SDPBackend.CUDNN_ATTENTION)
            return super().__call__(q, k, v)


class _HalfPrecision(Sdpa):
    """A single SDPA backend that computes in half precision only."""

    backend: ClassVar[SDPBackend]

    def __init__(self) -> None:
        super().__init__([self.backend])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._check(q)
        return super().__call__(q, k, v)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(q)
        _refuse_mask(self.name, mask)
        return super().with_lse(q, k, v)

    def _check(self, q: Tensor) -> None:
        if q.dtype not in _HALF:
            raise UnsupportedError(
                f"attention {self.name!r} computes in float16 and bfloat16, and this model runs in"
                f" {str(q.dtype).removeprefix('torch.')}: use auto or sdpa"
            )


class Flash(_HalfPrecision):
    name = "flash"
    backend = SDPBackend.FLASH_ATTENTION


class Cudnn(_HalfPrecision):
    name = "cudnn"
    backend = SDPBackend.CUDNN_ATTENTION

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(q)
        _refuse_mask(self.name, mask)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse.reshape(q.shape[:3])


class Sage(Kernel):
    """SageAttention (https://arxiv.org/abs/2410.02367): 8-bit scores, so results differ slightly. Opt-in only.

    Follows the package's sources, versions 1.0.6 and 2.2.0. Its log-sum-exp is the natural one of the scaled scores,
    [B, H, S_q] in fp32, but contains a term rounded to q's dtype (from the mean key, which it subtracts before it
    quantises). 1.x returns no log-sum-exp and silently accepts the argument.
    """

    name = "sage"

    _LARGEST_HEAD = 128

    def __init__(self) -> None:
        from sageattention import sageattn

        self._sageattn = sageattn
        if "return_lse" not in inspect.signature(sageattn).parameters:
            self.no_lse = (
                "attention 'sage' cannot be used in a ring (ring_degree above 1) with this version of sageattention,"
                " which gives no log-sum-exp; install sageattention 2, set ring_degree to 1, or use auto"
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert not self.no_lse
        _refuse_mask(self.name, mask)
        out, lse = self._run(q, k, v, return_lse=True)
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
        return out, lse

    def _run(self, q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Any:
        if q.dtype not in _HALF or q.shape[3] > self._LARGEST_HEAD:
            raise UnsupportedError(
                f"attention 'sage' computes in float16 and bfloat16, with heads of up to {self._LARGEST_HEAD} channels;"
                f" this model has {q.shape[3]} in {str(q.dtype).removeprefix('torch.')}: use auto, sdpa, cudnn or flash"
            )
        try:
            return self._sageattn(q, k, v, tensor_layout="HND", is_causal=False, **options)
        except (AssertionError, ValueError) as error:  # e.g. a GPU that it has no kernel for
            raise UnsupportedError(
                f"attention 'sage': sageattention refuses this model or GPU: {error}; use auto, sdpa, cudnn or flash"
            ) from error


def _refuse_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise UnsupportedError(
            f"attention {name!r} cannot be used in a ring (ring_degree above 1) by a model that masks its attention:"
            " set ring_degree to 1, or use auto or sdpa"
        )


def select(name: str, device: torch.device) -> Kernel:
    """Returns the kernel that `SPConfig.attention` names.

    `auto` lets PyTorch choose, with cuDNN first from compute capability 9.0 on, where it is the fastest of PyTorch's
    exact kernels; `sdpa` is PyTorch's default order.

    `config.resolve` has checked that the device can run the kernel; the kernel itself checks the model's dtype.
    """
    if name == "sage":
        return Sage()
    if name == "cudnn":
        return Cudnn()
    if name == "flash":
        return Flash()
    if name == "auto" and device.type == "cuda":
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if torch.cuda.get_device_capability(device) >= (9, 0):
            order.insert(0, SDPBackend.CUDNN_ATTENTION)
        log.info("attention auto: PyTorch SDPA, in the order %s", ", ".join(backend.name for backend in order))
        return Auto(order)
    return Sdpa()
