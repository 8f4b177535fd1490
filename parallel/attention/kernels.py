"""Attention kernels behind one signature: `kernel(q, k, v) -> out`, all [B, H, S, D], no mask, not causal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ConfigError

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _sdpa_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def select(name: str, device: torch.device) -> Kernel:
    """The kernel that `SPConfig.attention` asks for.

    `auto` and `sdpa` let PyTorch choose among its own kernels.

    Raises:
        ConfigError: the kernel does not exist on this device, or is not installed.
    """
    if name in ("auto", "sdpa"):
        return _sdpa
    if name == "sage":
        raise ConfigError("attention is 'sage', which this version does not offer yet; use auto, sdpa, cudnn or flash")
    if device.type != "cuda":
        raise ConfigError(f"attention is {name!r}, which needs a CUDA device; on {device.type} use auto or sdpa")
    return partial(_sdpa_backend, {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name])
