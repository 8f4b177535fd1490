"""Reads symbols of ComfyUI's from source files with `ast`: imports and runs nothing of them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Missing(Exception):
    """Raised if a symbol does not exist; carries its name up to the first part that is missing."""


@dataclass(frozen=True)
class Found:
    """Properties of a symbol, as far as they can be determined."""

    signature: inspect.Signature | None = None
    """Signature without `self`; None if the symbol is no function or class, or if it cannot be determined."""
    words: frozenset[str] | None = None
    """Names and texts in its code; None if it has none."""


@dataclass(frozen=True)
class _Item:
    """A module, class or function of the sources; without a node, an item of another library, or the value of an
    expression."""

    module: str
    node: ast.AST | None = None
    in_class: bool = False


class Sources:
    """Source files, parsed on demand.

    Args:
        files: the folder of a whole tree, or a mapping of modules to single files.
    """

    def __init__(self, files: Path | Mapping[str, Path]):
        self._files = files
        self._trees: dict[str, ast.Module | None] = {}
        self._packages: set[str] = set()

    def find(self, module: str, names: Sequence[str]) -> Found | None:
        if (tree := self._tree(module)) is None:
            if isinstance(self._files, Path):
                raise Missing(module)
            return None
        item = _Item(module, tree)
        for done, name in enumerate(names, 1):
            if (member := self._member(item, name)) is None:
                raise Missing(".".join([module, *names[:done]]))
            if (item := member).node is None:
                return Found()
        words = frozenset(_words(item.node)) if item.node is not None else None
        return Found(self._signature(item), words)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            file: Path | None
            if isinstance(self._files, Path):
                place = self._files.joinpath(*module.split("."))
                file = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)
            else:
                file = self._files.get(module)
            if file is not None and file.name == "__init__.py":
                self._packages.add(module)
            self._trees[module] = None if file is None else ast.parse(file.read_text(encoding="utf-8"), str(file))
        return self._trees[module]

    def _member(self, item: _Item, name: str) -> _Item | None:
        """Returns the item that `name` denotes in a module or a class; None if there is none."""
        if not isinstance(item.node, ast.Module | ast.ClassDef):
            return _Item(item.module)
        for node in _statements(item.node.body):
            if isinstance(node, _DEFINITIONS) and node.name == name:
                return _Item(item.module, node, isinstance(item.node, ast.ClassDef))
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _bound(node):
                return self._resolved(item.module, node.value)
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name.partition(".")[0]) == name:
                        return self._imported(item.module, node, alias)
                    if alias.name == "*" and (found := self._of(self._source(item.module, node), name)) is not None:
                        return found
        if isinstance(item.node, ast.Module):
            return None
        if name in _set_in_methods(item.node):
            return _Item(item.module)
        bases = (self._resolved(item.module, base) for base in item.node.bases)
        classes = (base for base in bases if isinstance(base.node, ast.ClassDef) and base.node is not item.node)
        return next((found for base in classes if (found := self._member(base, name)) is not None), None)

    def _resolved(self, module: str, expression: ast.expr | None) -> _Item:
        """Returns the item that a dotted name denotes in a module."""
        item: _Item | None = _Item(module, self._tree(module))
        for name in dotted(expression):
            item = None if item is None or item.node is None else self._member(item, name)
        return item if item is not None and dotted(expression) else _Item(module)

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> _Item:
        if isinstance(node, ast.Import):
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            return _Item(whole, self._tree(whole))
        source = self._source(module, node)
        if (found := self._of(source, alias.name)) is not None:
            return found
        return _Item(f"{source}.{alias.name}", self._tree(f"{source}.{alias.name}"))

    def _of(self, module: str, name: str) -> _Item | None:
        tree = self._tree(module)
        return None if tree is None else self._member(_Item(module, tree), name)

    def _source(self, module: str, node: ast.Import | ast.ImportFrom) -> str:
        """Returns the module that names are imported from."""
        assert isinstance(node, ast.ImportFrom)
        package = module.split(".") if module in self._packages else module.split(".")[:-1]
        start = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*start, *([node.module] if node.module else [])])

    def _signature(self, item: _Item) -> inspect.Signature | None:
        if isinstance(item.node, ast.ClassDef):
            if any("dataclass" in ast.unparse(each) for each in item.node.decorator_list):
                fields = [n for n in item.node.body if isinstance(n, ast.AnnAssign)]
                return inspect.Signature([_parameter(dotted(f.target)[0], _P.KEYWORD_ONLY, f.value) for f in fields])
            made = self._member(item, "__init__")
            return None if made is None or made.node is None else self._signature(made)
        if not isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        signature = signature_of(item.node.args)
        if not item.in_class or any(ast.unparse(each) == "staticmethod" for each in item.node.decorator_list):
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])


_P = inspect.Parameter
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def signature_of(taken: ast.arguments) -> inspect.Signature:
    """Returns a function's signature without annotations; defaults are `...`."""
    positional = [*taken.posonlyargs, *taken.args]
    defaults = [None] * (len(positional) - len(taken.defaults)) + taken.defaults
    return inspect.Signature(
        [
            *(
                _parameter(each.arg, _P.POSITIONAL_OR_KEYWORD, value)
                for each, value in zip(positional, defaults, strict=True)
            ),
            *(_P(each.arg, _P.VAR_POSITIONAL) for each in [taken.vararg] if each),
            *(
                _parameter(each.arg, _P.KEYWORD_ONLY, value)
                for each, value in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
            ),
            *(_P(each.arg, _P.VAR_KEYWORD) for each in [taken.kwarg] if each),
        ]
    )


def _parameter(name: str, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    return _P(name, kind, default=_P.empty if default is None else ...)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a module or class, including those inside `if`, `try` and `with`."""
    for node in body:
        yield node
        if not isinstance(node, _DEFINITIONS):
            for name in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, name, []):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _bound(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def dotted(expression: ast.expr | None) -> list[str]:
    """Splits `a.b` into ["a", "b"]; returns an empty list for any other expression."""
    names = ast.unparse(expression).split(".") if isinstance(expression, ast.Name | ast.Attribute) else []
    return names if all(map(str.isidentifier, names)) else []


def _set_in_methods(node: ast.ClassDef) -> set[str]:
    """Returns the attributes that the methods set, on an instance or the class."""
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {n.attr for n in stored if isinstance(n.value, ast.Name)}


def _words(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        for field in ("id", "attr", "arg", "value"):
            if isinstance(word := getattr(each, field, None), str):
                yield word
