"""Arguments and results of a network, nests of lists, dictionaries, numbers and text, as plain data beside tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Tree = Any
"""JSON: a tensor is {"tensor": its name}, a list or tuple {"list" or "tuple": […]}, a dictionary {"dict": {…}}, a set
{"set": […]}; what is left are numbers, text, true, false and null."""


class NotPlain(TypeError):
    """A value that cannot travel.

    Attributes:
        path: where it is, such as `minimax_payload.keyframes.0`.
        value: it.
    """

    def __init__(self, path: str, value: Any):
        super().__init__(f"{path} is a {type(value).__name__}, which is neither a tensor nor plain data")
        self.path, self.value = path, value


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Tree:
    """Puts the tensors of a nest into `tensors`, named by where they are; returns the rest.

    Raises:
        NotPlain: there is something else in it, code for example.
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
    """The nest again, with `tensor(name)` for each tensor."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {name: restore(item, tensor) for name, item in content.items()}
    if kind == "set":
        return set(content)
    assert kind in ("list", "tuple"), kind
    items = [restore(item, tensor) for item in content]
    return tuple(items) if kind == "tuple" else items
