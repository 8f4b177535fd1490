"""ComfyUI's attention functions, in a worker."""

from __future__ import annotations

from collections.abc import Callable

import comfy.ldm.modules.attention
from torch import Tensor

from ..errors import UnsupportedError


def registered(name: str) -> Callable[..., Tensor]:
    """Returns the attention function that ComfyUI has registered under this name.

    Raises:
        UnsupportedError: there is none.
    """
    function: Callable[..., Tensor] | None = comfy.ldm.modules.attention.get_attention_function(name, None)
    if function is None:
        raise UnsupportedError(f"ComfyUI in the workers has no attention {name!r}, which a node chooses")
    return function


def computes(name: str) -> str:
    """Returns the name in `attention.kernels` of the kernel that a function computes with: `sage` for functions named
    after sage or int8, which compute with 8 bits; `sdpa` for all others, which are exact."""
    return "sage" if "sage" in name or "int8" in name else "sdpa"
