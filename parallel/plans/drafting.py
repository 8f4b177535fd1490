"""Drafts a split plan from recorded forward passes: which dims look like tokens, where they are cut and joined.

A dim looks like tokens if its size equals the number of queries or keys of an attention in every pass: one with a
small latent, one with a larger latent, one with a longer text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..split.rules import Grouped, Tokens
from ..split.sites import Pairs, Plan, Rule, Site
from ..split.streams import Names
from .recording import UNNAMED, Call, Tree

Sizes = tuple[int, ...]
"""One size per pass: small latent, larger latent, longer text."""

_LIST = re.compile(r"(.+?)\.\d+(?=\.|$)")
"""Pattern that matches `a.b.3` in `a.b.3.c`; its group is `a.b`."""


class Draft:
    """Plan of a network, drafted from recorded passes.

    Attributes:
        streams: name → its number of tokens in each pass.
        plan: the draft.

    Args:
        passes: results of `record`, one for each pass.
    """

    def __init__(self, passes: Sequence[Mapping[str, Call]]):
        common = [path for path in passes[0] if all(path in each for each in passes)]
        self._calls = {path: _merged([each[path] for each in passes]) for path in common}
        self._parts = _parts(self._calls)
        self._lists = [
            path for path in self._parts
            if path not in self._calls and any(queries[0] != queries[1] for _, (queries, _, _) in self._attended(path))
        ]  # fmt: skip
        self.streams: dict[str, Sizes] = {}
        for path in self._lists:
            self._find_streams(path)
        self.plan: dict[str, Site] = {path: self._site(path, self._routes(path)) for path in self._lists}
        self._join()

    def _attended(self, part: str) -> Iterator[tuple[str, tuple[Sizes, Sizes, bool]]]:
        """Yields the module and the attention of each attention in the first module of a part."""
        for path, call in self._calls.items():
            if _is_in(path, self._parts[part][0]):
                yield from ((path, each) for each in call.attended)

    # ------------------------------------------------------------------------------------------------------- lengths

    def _find_streams(self, part: str) -> None:
        """Finds streams: lengths of attention, or the two sizes of arguments that add up to such a length."""
        call = self._calls[self._parts[part][0]]
        sizes = list(dict.fromkeys(_dims(list(call.arguments.values()))))
        for length in dict.fromkeys(length for _, each in self._attended(part) for length in each[:2]):
            if length[0] == length[1] or self._names(length):
                continue
            if length[0] == length[2]:
                self._name("image", length)
            elif pair := self._summands(length, [*self.streams.values(), *sizes]):
                self._name("text", pair[1])
                self._name("image", pair[0])
            else:
                self._name("joint", length)

    def _summands(self, length: Sizes, sizes: Sequence[Sizes]) -> tuple[Sizes, Sizes] | None:
        """Returns two sizes that add up to `length`: one depends only on the latent, the other only on the text."""
        for one in sizes:
            rest = tuple(whole - size for whole, size in zip(length, one, strict=True))
            if one[0] != one[1] and one[0] == one[2] and rest in sizes and rest[0] == rest[1] != rest[2]:
                return one, rest
        return None

    def _name(self, name: str, sizes: Sizes) -> None:
        if sizes not in self.streams.values():
            number = sum(each.partition("_")[0] == name for each in self.streams)
            self.streams[f"{name}_{number + 1}" if number else name] = sizes

    def _names(self, sizes: Sizes) -> Names:
        """Returns the streams whose concatenation has these sizes, the text first; empty if there are none."""
        for name, total in self.streams.items():
            if total == sizes:
                return (name,)
        for one, first in self.streams.items():
            for other, second in self.streams.items():
                if one != other and tuple(a + b for a, b in zip(first, second, strict=True)) == sizes:
                    return (other, one) if other == "text" else (one, other)
        return ()

    # --------------------------------------------------------------------------------------------------------- sites

    def _rule(self, tree: Tree) -> Rule:
        """Returns the rule for a value; None if nothing in it looks like tokens."""
        if isinstance(tree, list):
            rules = tuple(map(self._rule, tree))
            return rules if any(rules) else None
        if not isinstance(tree, tuple):
            return None
        for dim, sizes in enumerate(tree):
            if names := self._names(sizes):
                return Tokens(names, dim)
        if len(tree) > 1 and tree[1][0] != tree[1][1]:
            for name, total in self.streams.items():
                if not any(whole % size for whole, size in zip(total, tree[1], strict=True)):
                    return Grouped(name, len(tree))
        return None

    def _routes(self, part: str) -> dict[str, Pairs]:
        """Routes attention whose queries and keys are both split; other attention stays on the rank."""
        first = self._parts[part][0]
        pairs = [(path, self._names(queries), self._names(keys)) for path, (queries, keys, _) in self._attended(part)]
        split = {each[1:] for each in pairs if each[2]}
        alike = len(split) == 1 and all(keys for _, _, keys in pairs) and self._calls[first].options
        routes: dict[str, list[tuple[Names, Names]]] = {}
        for path, queries, keys in pairs:
            if queries and keys:
                found = routes.setdefault("" if alike else self._given_options(path, first), [])
                found += [(queries, keys)] * ((queries, keys) not in found)
        return {name: found[0] if len(found) == 1 else [*found] for name, found in routes.items()}

    def _given_options(self, path: str, first: str) -> str:
        """Returns the innermost module, from `path` upwards and below `first`, that receives the options; `path` if
        none does."""
        below = path
        while below != first and not self._calls[below].options:
            below = below.rpartition(".")[0]
        found = below if self._calls[below].options else path
        return found[len(first) :].lstrip(".")

    def _site(self, path: str, attention: Mapping[str, Pairs] | None = None) -> Site:
        """Returns the site of a list, or, without `attention`, of a module after the last list, which works on this
        rank's tokens."""
        arguments = self._calls[self._parts[path][0]].arguments
        rules = {name: self._rule(tree) for name, tree in arguments.items()}
        if attention is None:
            rules = {name: rule if isinstance(rule, Grouped) else None for name, rule in rules.items()}
        cut = {name: rule for name, rule in rules.items() if rule}
        whole = " ".join(name for name in rules if name not in cut)
        unnamed = " ".join(name for name in rules if re.fullmatch(UNNAMED + r"\d+", name))
        return Site(cut=cut, whole=whole, positional=unnamed, attention=attention or {})

    def _join(self) -> None:
        """Adds joins: at a list whose streams no later list takes; for the last list, at the last module after it with
        a result per token, if there is one."""
        order = list(self._calls)
        for number, path in enumerate(self._lists):
            if any(_streams(self.plan[path]) & _streams(self.plan[later]) for later in self._lists[number + 1 :]):
                continue
            end = max(number for number, each in enumerate(order) if _is_in(each, path))
            behind = [each for each in order[end + 1 :] if each in self._parts and self._rule(self._calls[each].result)]
            where = behind[-1] if behind and path == self._lists[-1] else path
            site = self.plan.get(where) or self._site(where)
            self.plan[where] = replace(site, join=self._rule(self._calls[self._parts[where][0]].result))

    # ---------------------------------------------------------------------------------------------------------- text

    def tree(self) -> str:
        """Describes the modules that receive tokens or attend, with arguments and shapes. `*` marks dims that look like
        tokens."""
        lines = [
            f"stream {name}: {small} tokens; {larger} of the larger latent, {text} with more text"
            for name, (small, larger, text) in self.streams.items()
        ]
        for part, (first, *others) in self._parts.items():
            title = part if part == first else f"{first}…{len(others)}" if others else first
            lines += self._described(title, first, "")
            lines += [
                line
                for path, call in self._calls.items()
                if path != first and _is_in(path, first) and any(_is_in(each, path) for each, _ in self._attended(part))
                for line in self._described(path, path, "  " * (path.count(".") - first.count(".")))
            ]
        return "\n".join(lines)

    def _described(self, title: str, path: str, indent: str) -> Iterator[str]:
        call = self._calls[path]
        yield f"{indent}{title} ({call.kind})"
        for name, tree in call.arguments.items():
            yield f"{indent}    {name} {self._shown(tree)}"
        if call.absent:
            yield f"{indent}    not given: {', '.join(call.absent)}"
        for queries, keys, options in dict.fromkeys(call.attended):
            without = "" if options else ", without transformer_options"
            yield f"{indent}    attention of {queries[0]} queries with {keys[0]} keys{without}"
        yield f"{indent}    → {self._shown(call.result)}"

    def _shown(self, tree: Tree) -> str:
        if isinstance(tree, list):
            return f"({'; '.join(map(self._shown, tree))})"
        if not isinstance(tree, tuple):
            return str(tree)
        dims = ", ".join(f"{sizes[0]}*" if self._names(sizes) else str(sizes[0]) for sizes in tree)
        names = dict.fromkeys("+".join(names) for sizes in tree if (names := self._names(sizes)))
        rule = self._rule(tree)
        remark = f"{source(rule)}?" if isinstance(rule, Grouped) else ", ".join(names)
        return f"[{dims}]  {remark}".rstrip()


def written(name: str, plan: Plan) -> str:
    """Returns a plan of the class `name` as source code in the form of `plans/comfyui.py`."""
    variables: dict[str, Names] = {}
    sites = ""
    for path, site in plan.items():
        sites += f'    "{path}": Site(\n'
        for each in fields(site):
            if (value := getattr(site, each.name)) not in ({}, each.default):
                sites += f"        {each.name}={source(value, variables)},\n"
        sites += "    ),\n"
    assigned = "".join(f"{variable} = {names!r}\n" for variable, names in variables.items()).replace("'", '"')
    constant = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()
    return f"{assigned}{constant}: Plan = {{\n{sites}}}"


def source(value: Any, variables: dict[str, Names] | None = None) -> str:
    """Returns a part of a plan as Python code. Streams are variables, e.g. `TI` for ("text", "image").

    Args:
        variables: collects the variables that occur.
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{source(key)}: {source(each, variables)}' for key, each in value.items())}}}"
    if is_dataclass(value):
        given = [(each, getattr(value, each.name)) for each in fields(value)]
        first_left_out = next((n for n, (each, one) in enumerate(given) if one == each.default), len(given))
        positional = [source(one, variables) for _, one in given[:first_left_out]]
        named = [f"{each.name}={source(one, variables)}" for each, one in given[first_left_out:] if one != each.default]
        return f"{type(value).__name__}({', '.join(positional + named)})"
    if isinstance(value, tuple) and value and all(isinstance(each, str) for each in value):
        variable = "".join(name[0].upper() + name.partition("_")[2] for name in value)
        if variables is not None:
            variables[variable] = value
        return variable
    if isinstance(value, list):
        return f"[{', '.join(source(each, variables) for each in value)}]"
    if isinstance(value, tuple):
        items = ", ".join(source(each, variables) for each in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _parts(calls: Mapping[str, Call]) -> dict[str, list[str]]:
    """Returns the lists of modules that attend, and the single modules directly below the network, in the order in
    which they begin: path → paths of the modules."""
    lists = {found[1] for path, call in calls.items() if call.attended and (found := _LIST.match(path))}
    parts: dict[str, list[str]] = {}
    for path in calls:
        found = _LIST.match(path)
        if found and found[1] in lists and found[0] == path:
            parts.setdefault(found[1], []).append(path)
        elif path and "." not in path and not any(_is_in(each, path) for each in lists):
            parts[path] = [path]
    return parts


def _merged(calls: Sequence[Call]) -> Call:
    """Merges a module's calls in all passes into one call, in which every size is `Sizes`."""
    first = calls[0]
    return replace(
        first,
        arguments={name: _side_by_side([each.arguments.get(name) for each in calls]) for name in first.arguments},
        result=_side_by_side([each.result for each in calls]),
        attended=[
            (tuple(each[0] for each in row), tuple(each[1] for each in row), row[0][2])
            for row in zip(*(each.attended for each in calls), strict=False)
        ],
    )


def _side_by_side(trees: Sequence[Tree]) -> Tree:
    """Returns tensors' dims as `Sizes`, and a text where values differ in type or length between the passes."""
    first = trees[0]
    if not isinstance(first, tuple | list):
        return first
    if any(type(each) is not type(first) or len(each) != len(first) for each in trees):
        return "unlike in the passes"
    rows = zip(*trees, strict=True)
    return tuple(rows) if isinstance(first, tuple) else [_side_by_side(row) for row in rows]


def _dims(tree: Tree) -> Iterator[Sizes]:
    """Yields the dims of all tensors."""
    if isinstance(tree, tuple):
        yield from tree
    elif isinstance(tree, list):
        for each in tree:
            yield from _dims(each)


def _streams(site: Site) -> set[str]:
    """Returns the streams whose tokens attend there."""
    pairs = [pair for pairs in site.attention.values() for pair in (pairs if isinstance(pairs, list) else [pairs])]
    return {name for pair in pairs for names in pair or () for name in names}


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
