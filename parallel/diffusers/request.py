"""Requests to the workers to call a transformer of diffusers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sampling.step_request import StepRequest
from ..wire.trees import flatten


def request(x: Tensor, timestep: Tensor, *, label: str = "", **named: Any) -> StepRequest:
    """Returns the request for a call of a transformer's `forward`.

    Args:
        x: `hidden_states`, in the dtype of the weights.
        timestep: [B].
        label: see `StepRequest`.
        named: other arguments: tensors, numbers, and nests of them.

    Raises:
        NotPlain: an argument cannot be sent.
    """
    tensors: dict[str, Tensor] = {}
    rest = {name: flatten(value, name, tensors) for name, value in named.items() if value is not None}
    rest |= {"hidden_states": {"tensor": "x"}, "timestep": {"tensor": "timestep"}, "return_dict": False}
    return StepRequest(x, timestep, tensors, {"dict": {"args": {"list": []}, "named": {"dict": rest}}}, label=label)
