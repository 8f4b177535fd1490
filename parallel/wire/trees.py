"""Splits nested arguments and results of a network into tensors and plain data, and reassembles them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Tree = Any
"""JSON of a nest: a tensor is {"tensor": its name}, a list or tuple {"list" or "tuple": […]}, a dictionary
{"dict": {…}}, a set {"set": […]}; numbers, text, true, false and null stay as they are."""


class NotPlain(TypeError):
    """A value that is neither a tensor nor plain data, and so cannot be sent.

    Attributes:
        path: its position in the nest, such as `minimax_payload.keyframes.0`.
        value: the value itself.
    """

    def __init__(self, path: str, value: Any):
        super().__init__(f"{path} is a {type(value).__name__}, which is neither a tensor nor plain data")
        self.path, self.value = path, value


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Tree:
    """Puts the tensors of a nest into `tensors`, named by their positions below `path`; returns the rest as a tree.

    Raises:
        NotPlain: the nest has other values, code for example.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: flatten(item, f"{path}.{name}", tensors) for name, item in value.items()}}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [flatten(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, set | frozenset) and all(isinstance(item, int | str) for item in value):
        return {"set": sorted(value)}
    raise NotPlain(path, value)


def restore(tree: Tree, tensor: Callable[[str], Tensor]) -> Any:
    """Restores the nest, calling `tensor(name)` for each tensor. `tree` may be any JSON.

    Raises:
        ValueError: `tree` is not a result of `flatten`, or `tensor` raises KeyError for a name in it.
    """
    try:
        return _restored(tree, tensor)
    except RecursionError as error:
        raise ValueError("a nest of tensors and plain data is nested too deeply") from error


def _restored(tree: Tree, tensor: Callable[[str], Tensor]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    kind, content = next(iter(tree.items())) if isinstance(tree, dict) and len(tree) == 1 else (None, None)
    if kind == "tensor" and isinstance(content, str):
        try:
            return tensor(content)
        except KeyError as error:
            raise ValueError(f"there is no tensor {reprlib.repr(content)}") from error
    if kind == "dict" and isinstance(content, dict):
        return {name: _restored(item, tensor) for name, item in content.items()}
    if kind in ("list", "tuple") and isinstance(content, list):
        items = [_restored(item, tensor) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "set" and isinstance(content, list) and all(isinstance(item, int | str) for item in content):
        return set(content)
    raise ValueError(f"{reprlib.repr(tree)} is no nest of tensors and plain data")
