"""Looks up symbols of ComfyUI's in this process: inspects the modules that ComfyUI has imported, and nothing more."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from .contract_readers import Found, Missing


class Loaded:
    """Modules that this process has imported. A module that exists but is not imported is unknown."""

    def find(self, module: str, names: Sequence[str]) -> Found | None:
        here: Any = sys.modules.get(module)
        if here is None:
            if _exists(module):
                return None
            raise Missing(module)
        owner: Any = None
        for done, name in enumerate(names, 1):
            if not hasattr(here, name):
                if isinstance(here, type) and name in _words_of_class(here):  # set in its methods
                    return Found()
                raise Missing(".".join([module, *names[:done]]))
            owner, here = here, getattr(here, name)
        if isinstance(here, type):
            return Found(_signature(here), frozenset(_words_of_class(here)))
        function = inspect.unwrap(here) if callable(here) else here
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType):
            return Found()
        signature = _signature(here)
        if signature and isinstance(owner, type) and isinstance(inspect.getattr_static(owner, names[-1]), FunctionType):
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        return Found(signature, frozenset(_words_of_code(function.__code__)))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _signature(symbol: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(symbol)
    except (TypeError, ValueError):
        return None


def _words_of_class(kind: type) -> set[str]:
    members = [getattr(each, "__func__", each) for base in kind.__mro__ for each in vars(base).values()]
    return {word for each in members if isinstance(each, FunctionType) for word in _words_of_code(each.__code__)}


def _words_of_code(code: CodeType) -> Iterator[str]:
    for words in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        yield from words
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words_of_code(constant)
        else:  # names of keyword arguments are a tuple
            yield from (c for c in (constant if isinstance(constant, tuple) else [constant]) if isinstance(c, str))
