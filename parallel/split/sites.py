"""Elements of a plan: rules and sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import UnsupportedError
from .streams import Names, Streams


class PlanError(UnsupportedError):
    """A plan does not fit the model, or this input. The message names class, argument, shape and what is allowed."""


@runtime_checkable
class Cut(Protocol):
    """Rule for an argument of a module."""

    def cut(self, value: Any, streams: Streams) -> Any:
        """Returns this rank's part of a whole value; a value that is already this rank's part is returned as it is.

        Raises:
            PlanError: the value is neither.
        """


@runtime_checkable
class Join(Protocol):
    """Rule for a result of a module."""

    def join(self, value: Any, streams: Streams) -> Any:
        """Returns the whole value. Collective: all ranks call it."""


Rule: TypeAlias = Any
"""A `Cut`, a `Join`, or both; a tuple of rules for the items of a tuple or list; None leaves a value as it is."""

Pairs: TypeAlias = "tuple[Names, Names] | list[tuple[Names, Names] | None]"
LOCAL = None
"""Entry of `Site.attention` for keys and values that are whole on every rank, so that nothing is exchanged."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module, or each module of a list, that works on this rank's tokens."""

    cut: Mapping[str, Rule] = field(default_factory=dict)
    """Maps arguments to rules. Order matters: the first argument with a stream defines its length. A question mark
    after the name marks an argument that not all versions of the model have."""
    whole: str | None = None
    """Arguments that all tokens share, separated by blanks. An argument in neither `cut` nor `whole` is refused if it
    is passed: a newer version of the model may index it by tokens. None: not checked."""
    positional: str = ""
    """Names of the arguments that the module takes as `*args`, in order, separated by blanks."""
    attention: Mapping[str, Pairs | None] = field(default_factory=dict)
    """Maps submodules ("": the module itself) to the streams of their queries and of their keys, or to LOCAL. A list of
    such pairs where a submodule attends in several ways, which are distinguished by their numbers of tokens. LOCAL, if
    it is in the list, is the last entry and matches any other attention; then all streams of keys but the last are
    whole."""
    by_name: bool = False
    """True if the module's attention does not receive the module's `transformer_options`: while the module runs, its
    attention function is then replaced by name in its Python module."""
    join: Rule = None
    """Rule for the module's result; for a list, for the result of its last module."""
    join_each: Rule = None
    """Rule for the result of each module of a list, for models that use whole tokens between the blocks."""


Plan: TypeAlias = Mapping[str, Site]
"""Maps the path of a module or list of modules ("" is the model) to its site. "list.*.name" is that submodule of each
module of a list."""


def by_value_alone(rule: Rule) -> bool:
    """Returns True if equal values are cut alike within a forward pass, and cutting has no other effect: the rule
    depends on no other argument, and keeps nothing for a join."""
    if isinstance(rule, tuple):
        return all(each is None or by_value_alone(each) for each in rule)
    return getattr(rule, "BY_VALUE_ALONE", False)


def by_size_alone(rule: Rule) -> int | None:
    """Returns the dimension whose size alone decides what the rule does while the streams keep their lengths: once it
    has returned a value unchanged, it returns every value of that size unchanged. Such a rule has a field `dim`,
    depends on no other argument, and keeps nothing for a join. None: the rule must be applied to each value. The class
    attribute `BY_SIZE_ALONE` is not inherited: a subclass has to declare it itself."""
    return rule.dim if vars(type(rule)).get("BY_SIZE_ALONE", False) else None


def prepared(what: str, rule: Rule) -> Callable[[Any, Streams], Any]:
    """Returns `rule.cut` or `rule.join` as a function of a value; where the rule is a tuple, it applies to each
    item."""
    if rule is None:
        return lambda value, streams: value
    if not isinstance(rule, tuple):
        method: Callable[[Any, Streams], Any] = getattr(rule, what)
        return method
    parts = [prepared(what, each) for each in rule]

    def each_one(value: Any, streams: Streams) -> Any:
        if not isinstance(value, tuple | list) or len(value) != len(parts):
            raise PlanError(f"expected {len(parts)} items, received {_described(value)}")
        return type(value)(
            None if item is None else part(item, streams) for part, item in zip(parts, value, strict=True)
        )

    return each_one


def _described(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
