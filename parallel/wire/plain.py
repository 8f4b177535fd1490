"""Decomposition of weights, quantised or not, into plain tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_tensors(value: Tensor) -> list[Tensor]:
    """Returns the plain tensors of a weight: itself, or the values and scales of a quantised one."""
    wrapper: Any = value  # for mypy, no Tensor is such a subclass
    if not is_traceable_wrapper_subclass(wrapper):
        return [value]
    names, _ = wrapper.__tensor_flatten__()
    return [getattr(value, name) for name in names]
