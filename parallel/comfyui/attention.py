"""ComfyUI's attention functions, in a worker."""

from __future__ import annotations

from collections.abc import Callable

import comfy.ldm.modules.attention
from torch import Tensor

from ..errors import UnsupportedError


def registered(name: str) -> Callable[..., Tensor]:
    """The attention function that ComfyUI has under this name.

    Raises:
        UnsupportedError: there is none.
    """
    function: Callable[..., Tensor] | None = comfy.ldm.modules.attention.get_attention_function(name, None)
    if function is None:
        raise UnsupportedError(f"ComfyUI in the workers has no attention {name!r}, which a node chooses")
    return function


def computes(name: str) -> str:
    """What a function computes with, by the names of `attention.kernels`: `sage` and int8 with 8 bits, all others
    exactly."""
    return "sage" if "sage" in name or "int8" in name else "sdpa"
