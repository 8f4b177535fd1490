"""What a model's modules are called with in a forward pass, and which attention it computes: names and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..split.routes import OPTIONS, OVERRIDE, named_attention

UNNAMED = "arg_"
"""Begins the name, followed by its place, of what a module takes as `*args`."""

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
        q, k, v, _, stays_apart, _ = named_attention(args, kwargs)
        recording.attended.append(Attended(running[-1], q.shape[2], k.shape[2], True))
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        return out if stays_apart else out.transpose(1, 2).flatten(2)

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
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if any(each.kind is each.VAR_POSITIONAL for each in parameters):
            names += [f"{UNNAMED}{number}" for number in range(len(names), len(args))]
        given = dict(zip(names, args, strict=False)) | kwargs
        arguments = {name: shapes(value) for name, value in given.items() if value is not None and name != OPTIONS}
        absent = tuple(name for name in names if given.get(name) is None and name != OPTIONS)
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
