"""What a plan is made of."""

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
    """A rule for what comes into a module."""

    def cut(self, value: Any, streams: Streams) -> Any:
        """This rank's part of a whole value; what is this rank's already is returned as it is.

        Raises:
            PlanError: it is neither.
        """


@runtime_checkable
class Join(Protocol):
    """A rule for what leaves a module."""

    def join(self, value: Any, streams: Streams) -> Any:
        """The whole value; all ranks call."""


Rule: TypeAlias = Any
"""A `Cut`, a `Join`, or both; a tuple of rules for the items of a tuple or list; None leaves a value as it is."""

Pairs: TypeAlias = "tuple[Names, Names] | list[tuple[Names, Names] | None]"
LOCAL = None
"""In `Site.attention`: keys and values are whole on every rank, so nothing is exchanged."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module, or each module of a list, that works on this rank's tokens."""

    cut: Mapping[str, Rule] = field(default_factory=dict)
    """Argument → rule, in this order: the first to name a stream gives it its length. An argument with a question mark
    is one that not all versions of the model have."""
    whole: str | None = None
    """Arguments that all tokens share, separated by blanks. What is in neither is refused if it is given: a newer
    version of the model may index it by tokens. None: not checked."""
    positional: str = ""
    """Names for what the module takes as `*args`, in order, separated by blanks."""
    attention: Mapping[str, Pairs | None] = field(default_factory=dict)
    """Submodule ("": all of it) → streams of its queries and of its keys, or LOCAL. A list of such pairs where it
    attends in several ways, which are told apart by their numbers of tokens; with LOCAL, which stands last and is any
    other, all streams of keys but the last are whole."""
    by_name: bool = False
    """Its attention takes other `transformer_options` than the module's: while the module runs, the function that
    attention calls is another."""
    join: Rule = None
    """For what leaves the module; of a list: its last module."""
    join_each: Rule = None
    """For what leaves each module of a list: where the model takes whole tokens between the blocks."""


Plan: TypeAlias = Mapping[str, Site]
"""Path of a module or list of modules ("" is the model) → what happens there. "list.*.name" is that submodule of each
module of a list."""


def by_value_alone(rule: Rule) -> bool:
    """Whether equal values are cut alike within a forward pass, and nothing else happens: the rule looks at no other
    argument, and keeps nothing for a join."""
    if isinstance(rule, tuple):
        return all(each is None or by_value_alone(each) for each in rule)
    return getattr(rule, "BY_VALUE_ALONE", False)


def by_size_alone(rule: Rule) -> int | None:
    """The dimension whose size alone decides what the rule does while the streams keep their lengths: if it has
    returned one value unchanged, it does so with every value of that size. Such a rule has a field `dim`, looks at no
    other argument, and keeps nothing for a join. None: it is asked about each value. A subclass has to say so
    itself."""
    return rule.dim if vars(type(rule)).get("BY_SIZE_ALONE", False) else None


def prepared(what: str, rule: Rule) -> Callable[[Any, Streams], Any]:
    """`rule.cut` or `rule.join`, as a function of a value; of each item where the rule is a tuple."""
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
