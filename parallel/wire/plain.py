"""Weights of any kind as plain tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_tensors(value: Tensor) -> list[Tensor]:
    """What a weight consists of: itself, or the values and the scales of a quantised one."""
    wrapper: Any = value  # mypy knows no tensor that is such a subclass
    if not is_traceable_wrapper_subclass(wrapper):
        return [value]
    names, _ = wrapper.__tensor_flatten__()
    return [getattr(value, name) for name in names]
