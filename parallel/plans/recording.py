"""What a model's modules are called with in a forward pass, and which attention it computes: names and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..split.routes import OPTIONS, OVERRIDE

Tree = Any
"""A value's shapes: a tuple of sizes for a tensor, a list or dictionary of trees, a type's name for the rest."""


@dataclass(frozen=True, slots=True)
class Call:
    """A module's first call."""

    kind: str
    """Class of the module."""
    arguments: Mapping[str, Tree]
    """By name; without those that are None, and without `transformer_options`."""
    absent: tuple[str, ...]
    """Arguments that were None or not given."""
    options: bool
    """Whether it was given `transformer_options`."""
    result: Tree


@dataclass(frozen=True, slots=True)
class Attended:
    """One attention."""

    module: str
    """The innermost module that ran."""
    queries: int
    keys: int
    options: bool
    """Whether it was given `transformer_options`, by which it can be routed."""


@dataclass(slots=True)
class Recording:
    """A forward pass."""

    calls: dict[str, Call] = field(default_factory=dict)
    """Path of the module → its first call, in the order in which modules begin."""
    attended: list[Attended] = field(default_factory=list)


def record(network: nn.Module, run: Callable[[dict[str, Any]], Any]) -> Recording:
    """Records `run(transformer_options)`, which calls the network with these options. Nothing is left behind.

    Attention that is given the options is not computed: its result is zeros.
    """
    recording, running = Recording(), [""]
    handles = []
    for path, module in network.named_modules():
        before, after = _hooks(path, recording, running)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    def override(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(("q", "k", "v", "heads"), args, strict=False)) | kwargs
        q, k, v, heads = (named[name] for name in ("q", "k", "v", "heads"))
        apart = bool(named.get("skip_reshape"))
        recording.attended.append(Attended(running[-1], q.shape[-2], k.shape[-2], True))
        batch, length, width = q.shape[0], q.shape[-2], v.shape[-1] if apart else v.shape[-1] // heads
        if named.get("skip_output_reshape"):
            return q.new_zeros(batch, heads, length, width)
        return q.new_zeros(batch, length, heads * width)

    try:
        with _Unrouted(recording, running):
            run({OVERRIDE: override})
    finally:
        for handle in handles:
            handle.remove()
    return recording


class _Unrouted(TorchFunctionMode):
    """Attention that goes to torch directly, or by way of ComfyUI without the options."""

    def __init__(self, recording: Recording, running: list[str]):
        super().__init__()
        self._recording, self._running = recording, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            self._recording.attended.append(Attended(self._running[-1], q.shape[-2], k.shape[-2], False))
        return func(*args, **(kwargs or {}))


def _hooks(path: str, recording: Recording, running: list[str]) -> tuple[Any, Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(path)
        if path in recording.calls:
            return
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        arguments = {name: shapes(value) for name, value in given.items() if value is not None and name != OPTIONS}
        absent = tuple(name for name in names if given.get(name) is None and name not in (OPTIONS, "args", "kwargs"))
        recording.calls[path] = Call(type(module).__name__, arguments, absent, OPTIONS in given, None)

    def after(module: nn.Module, args: Any, result: Any) -> None:
        running.pop()
        call = recording.calls[path]
        if call.result is None:
            recording.calls[path] = Call(call.kind, call.arguments, call.absent, call.options, shapes(result))

    return before, after


def shapes(value: Any) -> Tree:
    """The sizes of each tensor in a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [shapes(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): shapes(each) for name, each in value.items()}
    return type(value).__name__
