"""Converts dataclasses to JSON, and restores them by their annotations."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Converts dataclasses, lists, tuples and dictionaries, nested at will, and plain data to JSON types."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(kind: type[T], value: Any) -> T:
    """Restores an instance of the dataclass `kind` from the result of `to_plain`. `value` may be any JSON.

    Raises:
        TypeError: `value` does not have exactly the fields of `kind`, or a field has the wrong type.
        ValueError: a dataclass rejects the values of its fields.
    """
    made: T = _restored(kind, value, kind.__name__)
    return made


def _restored(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where)
    if (fields := _fields(kind)) is not None:
        if not isinstance(value, dict) or value.keys() != fields.keys():
            raise TypeError(f"{where}: {reprlib.repr(value)} has not the fields {', '.join(fields)}")
        return kind(**{name: _restored(fields[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin in (list, tuple) and isinstance(value, list):
        each = arguments[0]
        return origin(_restored(each, item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: _restored(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    is_whole_float = kind is float and type(value) is int and abs(value) <= sys.float_info.max
    if is_whole_float or (isinstance(kind, type) and type(value) is kind):
        return value
    raise TypeError(f"{where} is {reprlib.repr(value)}, and should be {kind}")


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Restores a value of a union; among dataclasses, chooses the one with exactly the fields of `value`."""
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        fields = _fields(kind)
        if fields is None or (isinstance(value, dict) and value.keys() == fields.keys()):
            return _restored(kind, value, where)
    raise TypeError(f"{where}: {reprlib.repr(value)} is none of {', '.join(str(kind) for kind in kinds)}")


@cache
def _fields(kind: Any) -> dict[str, Any] | None:
    """Returns the annotations of a dataclass by field name; None if `kind` is not one."""
    if not dataclasses.is_dataclass(kind):
        return None
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
