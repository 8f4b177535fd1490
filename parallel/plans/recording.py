"""Records the calls of a model's modules in a forward pass, and the attention that they compute: names and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..split.routes import OPTIONS, OVERRIDE

UNNAMED = "arg_"
"""Prefix of the names of arguments that a module takes as `*args`; their position follows."""

Tree = Any
"""Shapes of a value: a tuple of sizes for a tensor, a list of trees for a tuple or list, a text for anything else."""


@dataclass(slots=True)
class Call:
    """A module's first call."""

    kind: str
    """Class of the module."""
    arguments: dict[str, Tree]
    """Shapes by name; without arguments that are None, and without `transformer_options`."""
    absent: list[str]
    """Arguments that were None or not passed."""
    options: bool
    """True if it received `transformer_options`."""
    result: Tree = None
    attended: list[tuple[Any, Any, bool]] = field(default_factory=list)
    """Number of queries, number of keys, and whether `transformer_options` were passed, through which it can be routed:
    of each attention while this was the innermost module, in all its calls."""


def record(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Call]:
    """Calls a network of ComfyUI's and records the calls of its modules. Leaves nothing behind.

    Args:
        arguments: arguments of its `forward`, by name, without `transformer_options`.

    Returns:
        Path of a module → its first call, in the order in which modules begin.
    """
    recorder, handles = _Recorder(), []
    for path, module in network.named_modules():
        handles += [
            module.register_forward_pre_hook(partial(recorder.begin, path), with_kwargs=True),
            module.register_forward_hook(partial(recorder.end, path), always_call=True),
        ]
    try:
        with recorder:
            network(**arguments, transformer_options={OVERRIDE: recorder.routed})
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Recorder of all attention that ends in torch's function, as ComfyUI's does with
    `--use-pytorch-cross-attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}
        self._running: list[str] = []
        self._options = False

    def begin(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(path)
        if path in self.calls:
            return
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if any(each.kind is each.VAR_POSITIONAL for each in parameters):
            names += [f"{UNNAMED}{number}" for number in range(len(names), len(args))]
        given = {n: v for n, v in (dict(zip(names, args, strict=False)) | kwargs).items() if v is not None}
        self.calls[path] = Call(
            kind=type(module).__name__,
            arguments={name: shapes(value) for name, value in given.items() if name != OPTIONS},
            absent=[name for name in names if name not in (*given, OPTIONS)],
            options=OPTIONS in given,
        )

    def end(self, path: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self._running.pop()
        if self.calls[path].result is None:
            self.calls[path].result = shapes(result)

    def routed(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs ComfyUI's attention `function`; ComfyUI calls this override wherever attention receives the options."""
        self._options = True
        try:
            return function(*args, **kwargs)
        finally:
            self._options = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys = (each.shape[-2] for each in args[:2])
            self.calls[self._running[-1]].attended.append((queries, keys, self._options))
        return func(*args, **(kwargs or {}))


def shapes(value: Any) -> Tree:
    """Returns the sizes of each tensor in a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [shapes(each) for each in value]
    return f"{{{', '.join(map(str, value))}}}" if isinstance(value, Mapping) else type(value).__name__
