"""Drafts a split plan from recorded forward passes: which dims look like tokens, where they are cut and joined.

A dim looks like tokens if its size is that of an attention's queries or keys in every pass: one with a small latent,
one with a larger, one with a longer text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..split.sites import Plan
from .recording import UNNAMED, Attended, Recording, Tree

Sizes = tuple[int, ...]
"""One size in each pass: small latent, larger latent, longer text."""
Names = tuple[str, ...]

SINGLE, TEXT, JOINT = "image", "text", "joint"


@dataclass(frozen=True, slots=True)
class Part:
    """Modules of one kind that are called alike: a list's, or a single one."""

    path: str
    """Of the list, or of the module."""
    count: int
    """Modules in the list; 0: a single module."""
    first: str
    """Path of the first one that is called."""


class Draft:
    """What the passes show of a network.

    Attributes:
        streams: name → its tokens in each pass.
        sites: path → `cut`, `whole`, `attention` and `join` as source, and remarks.
    """

    def __init__(self, network: str, passes: Sequence[Recording]):
        self.network, self.passes = network, passes
        self.streams: dict[str, Sizes] = {}
        self.sites: dict[str, dict[str, Any]] = {}
        if any(list(each.calls) != list(self.passes[0].calls) for each in self.passes):
            common = [path for path in self.passes[0].calls if all(path in each.calls for each in self.passes)]
            for each in self.passes:
                each.calls = {path: each.calls[path] for path in common}
        self._parts = list(_parts(self.passes[0]))
        self._find_streams()
        for part in self._parts:
            if part.count and self._follows_latent(self._attended(part)):
                self.sites[part.path] = self._site(part)
        self._find_joins()

    # ------------------------------------------------------------------------------------------------------- lengths

    def _attended(self, part: Part) -> list[tuple[str, Sizes, Sizes, bool]]:
        """(module, queries, keys, options) of the attention in the first module of a part."""
        inside: list[list[Attended]] = [
            [each for each in recording.attended if _is_in(each.module, part.first)] for recording in self.passes
        ]
        return [
            (row[0].module, tuple(each.queries for each in row), tuple(each.keys for each in row), row[0].options)
            for row in zip(*inside, strict=False)
        ]

    def _follows_latent(self, attended: Sequence[tuple[str, Sizes, Sizes, bool]]) -> bool:
        return any(queries[0] != queries[1] for _, queries, _, _ in attended)

    def _find_streams(self) -> None:
        """Streams are lengths of attention, or what they are the sum of among the sizes of arguments."""
        for part in self._parts:
            attended = self._attended(part)
            if not (part.count and self._follows_latent(attended)):
                continue
            sizes = list(dict.fromkeys(size for dims in self._leaves(part) for size in dims))
            for length in dict.fromkeys(each for row in attended for each in row[1:3]):
                if length[0] == length[1] or self._names(length):
                    continue
                if length[0] == length[2]:
                    self._name(SINGLE, length)
                elif pair := self._summands(length, sizes):
                    self._name(TEXT, pair[1])
                    self._name(SINGLE, pair[0])
                else:
                    self._name(JOINT, length)

    def _summands(self, length: Sizes, sizes: Sequence[Sizes]) -> tuple[Sizes, Sizes] | None:
        for one in [*self.streams.values(), *sizes]:
            rest = tuple(whole - size for whole, size in zip(length, one, strict=True))
            known = rest in sizes or rest in self.streams.values()
            if one[0] != one[1] and one[0] == one[2] and known and rest[0] == rest[1] != rest[2]:
                return one, rest
        return None

    def _name(self, name: str, sizes: Sizes) -> None:
        if sizes not in self.streams.values():
            number = sum(each.partition("_")[0] == name for each in self.streams)
            self.streams[f"{name}_{number + 1}" if number else name] = sizes

    def _names(self, sizes: Sizes) -> Names:
        """Streams, end to end, of which a dim has the sizes."""
        for name, total in self.streams.items():
            if total == sizes:
                return (name,)
        for one, first in self.streams.items():
            for other, second in self.streams.items():
                if one != other and tuple(a + b for a, b in zip(first, second, strict=True)) == sizes:
                    return (TEXT, one if other == TEXT else other) if TEXT in (one, other) else (one, other)
        return ()

    def _leaves(self, part: Part) -> Iterator[list[Sizes]]:
        """The sizes of each dim of every tensor that the first module of a part is given."""
        calls = [recording.calls[part.first] for recording in self.passes]
        for name in calls[0].arguments:
            yield from _leaves([call.arguments.get(name) for call in calls])

    # --------------------------------------------------------------------------------------------------------- sites

    def _rule(self, trees: Sequence[Tree]) -> str:
        """Source of the rule for a value; empty where nothing in it looks like tokens."""
        if all(isinstance(tree, tuple) for tree in trees):
            return self._tensor_rule(_by_dim(trees))
        if all(isinstance(tree, list) for tree in trees) and len({len(tree) for tree in trees}) == 1:
            rules = [self._rule(items) for items in zip(*trees, strict=True)]
            if any(rules):
                items = ", ".join(rule or "None" for rule in rules)
                return f"({items},)" if len(rules) == 1 else f"({items})"
        return ""

    def _tensor_rule(self, dims: Sequence[Sizes]) -> str:
        for dim, sizes in enumerate(dims):
            if names := self._names(sizes):
                return f"Tokens({_variable(names)})" if dim == 1 else f"Tokens({_variable(names)}, {dim})"
        for name, total in self.streams.items():
            if len(dims) > 1 and dims[1][0] != dims[1][1] and not any(
                whole % size for whole, size in zip(total, dims[1], strict=True)
            ):  # fmt: skip
                return f'Grouped("{name}", {len(dims)})'
        return ""

    def _site(self, part: Part) -> dict[str, Any]:
        calls = [recording.calls[part.first] for recording in self.passes]
        rules = {name: self._rule([call.arguments.get(name) for call in calls]) for name in calls[0].arguments}
        site: dict[str, Any] = {
            "cut": {name: rule for name, rule in rules.items() if rule},
            "whole": [name for name, rule in rules.items() if not rule],
            "absent": list(calls[0].absent),
            "attention": {},
            "join": "",
            "remarks": [],
        }
        self._route(part, site)
        return site

    def _route(self, part: Part, site: dict[str, Any]) -> None:
        """Exchanges attention whose keys are split, too; the rest stays on the rank."""
        attended = self._attended(part)
        split = {(self._names(queries), self._names(keys)) for _, queries, keys, _ in attended if self._names(keys)}
        local = [row for row in attended if not self._names(row[2])]
        routes: dict[str, dict[str, None]] = {}
        for module, queries, keys, options in attended:
            where = _below(module, part.first)
            pair = self._names(queries), self._names(keys)
            if not pair[1]:
                continue
            if not pair[0]:
                site["remarks"].append(f"{where or 'it'} attends to tokens by {queries[0]} queries, which are none")
                continue
            if not options:
                site["remarks"].append(f"{where or 'it'} attends without transformer_options")
            name = where if local or len(split) > 1 or not self.passes[0].calls[part.first].options else ""
            pairs = routes.setdefault(self._given_options(part, name), {})
            pairs[f"({_variable(pair[0])}, {_variable(pair[1])})"] = None
        site["attention"] = {
            name: ", ".join(pairs) if len(pairs) == 1 else f"[{', '.join(pairs)}]" for name, pairs in routes.items()
        }

    def _given_options(self, part: Part, name: str) -> str:
        """The innermost module from `name` up that is given the options."""
        calls = self.passes[0].calls
        while name and not calls[f"{part.first}.{name}"].options:
            if not any(call.options for path, call in calls.items() if _is_in(path, part.first)):
                return name
            name = name.rpartition(".")[0]
        return name

    def _find_joins(self) -> None:
        """Behind the last list: the last module with a result per token; else the list's last module. A list whose
        streams no later list takes: there."""
        if not self.sites:
            return
        lists = list(self.sites)
        for number, path in enumerate(lists[:-1]):
            taken = {name for later in lists[number + 1 :] for name in _used(self.sites[later])}
            if not _used(self.sites[path]) & taken:
                first = next(part.first for part in self._parts if part.path == path)
                self.sites[path]["join"] = self._rule([recording.calls[first].result for recording in self.passes])
        paths = list(self.passes[0].calls)
        last = [part for part in self._parts if part.path in self.sites][-1]
        behind = paths[max(n for n, path in enumerate(paths) if _is_in(path, last.path)) + 1 :]
        for path in reversed([path for path in behind if "." not in path and path]):
            calls = [recording.calls[path] for recording in self.passes]
            if joined := self._rule([call.result for call in calls]):
                rules = {name: self._rule([call.arguments.get(name) for call in calls]) for name in calls[0].arguments}
                self.sites[path] = {
                    "cut": {name: rule for name, rule in rules.items() if rule.startswith("Grouped")},
                    "whole": [name for name, rule in rules.items() if not rule.startswith("Grouped")],
                    "absent": list(calls[0].absent),
                    "attention": {},
                    "join": joined,
                    "remarks": [],
                }
                return
        calls = [recording.calls[last.first] for recording in self.passes]
        self.sites[last.path]["join"] = self._rule([call.result for call in calls])

    # ---------------------------------------------------------------------------------------------------------- text

    def tree(self) -> str:
        """The modules that are given tokens or attend, with arguments and shapes. `*` marks what looks like tokens."""
        lines = []
        for name, sizes in self.streams.items():
            lines.append(
                f"stream {name}: {sizes[0]} tokens; {sizes[1]} of the larger latent, {sizes[2]} with more text"
            )
        for part in self._parts:
            modules = [path for path in self.passes[0].calls if _is_in(path, part.first)]
            shown = [
                path
                for path in modules
                if path == part.first
                or any(_is_in(each.module, path) and each.module for each in self.passes[0].attended)
            ]
            for path in shown:
                lines += self._described(part, path)
        return "\n".join(lines)

    def _described(self, part: Part, path: str) -> Iterator[str]:
        calls = [recording.calls[path] for recording in self.passes]
        title = part.path if path == part.first else path
        if path == part.first and part.count:
            title += f".0…{part.count - 1}" if part.count > 1 else ".0"
        indent = "  " * (path.count(".") - part.first.count(".")) if path != part.first else ""
        yield f"{indent}{title} ({calls[0].kind})"
        for name in calls[0].arguments:
            yield f"{indent}    {name} {self._shown([call.arguments.get(name) for call in calls])}"
        if calls[0].absent:
            yield f"{indent}    not given: {', '.join(calls[0].absent)}"
        rows = [each for each in self.passes[0].attended if each.module == path]
        for row in dict.fromkeys(rows):
            without = "" if row.options else ", without transformer_options"
            yield f"{indent}    attention of {row.queries} queries with {row.keys} keys{without}"
        yield f"{indent}    → {self._shown([call.result for call in calls])}"

    def _shown(self, trees: Sequence[Tree]) -> str:
        if all(isinstance(tree, tuple) for tree in trees):
            dims = _by_dim(trees)
            marked = [f"{sizes[0]}*" if self._names(sizes) else str(sizes[0]) for sizes in dims]
            names = dict.fromkeys("+".join(self._names(sizes)) for sizes in dims if self._names(sizes))
            grouped = "" if names or not self._tensor_rule(dims) else f"  {self._tensor_rule(dims)}?"
            return f"[{', '.join(marked)}]{grouped}" + (f"  {', '.join(names)}" if names else "")
        first = trees[0]
        if isinstance(first, list) and all(isinstance(tree, list) and len(tree) == len(first) for tree in trees):
            return f"({'; '.join(self._shown(items) for items in zip(*trees, strict=True))})"
        if isinstance(first, Mapping):
            return f"{{{', '.join(first)}}}"
        return str(first)

    def plan(self) -> str:
        """The draft, as a plan is written."""
        if not self.sites:
            return "# no list of blocks attends to tokens of the latent"
        lines = [f'{_variable((name,))} = ("{name}",)' for name in self.streams]
        used = {name for site in self.sites.values() for name in _used(site)}
        for name in sorted(name for name in used if len(name.rstrip("0123456789")) > 1):
            parts = ", ".join(f"*{each}" for each in re.findall("[A-Z][0-9]*", name))
            lines.append(f"{name} = ({parts})  # or the reverse, as `forward` has it")
        lines += [f"{_constant(self.network)}: Plan = {{"]
        for path, site in self.sites.items():
            lines.append(f'    "{path}": Site(')
            if given := [name for name in [*site["cut"], *site["whole"]] if re.fullmatch(UNNAMED + r"\d+", name)]:
                lines.append(f'        positional="{" ".join(given)}",  # give them names')
            if site["cut"]:
                lines.append("        cut={")
                lines += [f'            "{name}": {rule},' for name, rule in site["cut"].items()]
                lines.append("        },")
            if site["cut"] or site["whole"]:
                lines.append(f'        whole="{" ".join(site["whole"])}",')
            if site["absent"]:
                lines.append("        # refused if given, until a rule or `whole` names it:")
                lines.append(f"        # {', '.join(site['absent'])}")
            if site["attention"]:
                routes = ", ".join(f'"{name}": {pair}' for name, pair in site["attention"].items())
                lines.append(f"        attention={{{routes}}},")
            if site["join"]:
                lines.append(f"        join={site['join']},")
            lines += [f"        # {remark}" for remark in dict.fromkeys(site["remarks"])]
            lines.append("    ),")
        return "\n".join([*lines, "}"])


def written(plan: Plan) -> str:
    """A plan that exists, a line for each of what it says."""
    lines = []
    for path, site in plan.items():
        lines.append(f'"{path}":')
        lines += [f"    cut {name}: {rule!r}" for name, rule in site.cut.items()]
        lines += [] if site.whole is None else [f"    whole: {site.whole}"]
        lines += [f"    attention {name!r}: {pair}" for name, pair in site.attention.items()]
        joins = {"join": site.join, "join of each": site.join_each}
        lines += [f"    {name}: {rule!r}" for name, rule in joins.items() if rule is not None]
    return "\n".join(lines)


def _parts(recording: Recording) -> Iterator[Part]:
    """The lists of modules that attend, and the single modules below the network itself, as they begin."""
    attending = {each.module for each in recording.attended}
    lists: dict[str, list[str]] = {}
    singles: dict[str, None] = {}
    order: list[str] = []
    for path in recording.calls:
        if (found := _list_of(path)) is not None:
            name, member = found
            if any(_is_in(module, name) for module in attending):
                if name not in lists:
                    order.append(name)
                members = lists.setdefault(name, [])
                if member not in members:
                    members.append(member)
        elif path and "." not in path and path not in singles:
            singles[path] = None
            order.append(path)
    for name in order:
        if name in lists:
            yield Part(name, len(lists[name]), lists[name][0])
        elif not any(_is_in(other, name) for other in lists):
            yield Part(name, 0, name)


def _list_of(path: str) -> tuple[str, str] | None:
    """Of "a.b.3.c": "a.b" and "a.b.3"."""
    parts = path.split(".")
    for number, part in enumerate(parts):
        if part.isdigit() and number:
            return ".".join(parts[:number]), ".".join(parts[: number + 1])
    return None


def _is_in(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _below(path: str, module: str) -> str:
    return path[len(module) :].lstrip(".")


def _by_dim(trees: Sequence[Sequence[int]]) -> list[Sizes]:
    """The sizes of each dim in all passes; none where the tensors have unequal numbers of dims."""
    return list(zip(*trees, strict=True)) if len({len(tree) for tree in trees}) == 1 else []


def _leaves(trees: Sequence[Tree]) -> Iterator[list[Sizes]]:
    if all(isinstance(tree, tuple) for tree in trees):
        yield _by_dim(trees)
    elif all(isinstance(tree, list) for tree in trees):
        for items in zip(*trees, strict=False):
            yield from _leaves(items)


def _variable(names: Names) -> str:
    return "".join(name[0].upper() + name.partition("_")[2] for name in names)


def _used(site: Mapping[str, Any]) -> set[str]:
    """Variables in a site's rules."""
    text = " ".join([*site["cut"].values(), *site["attention"].values(), site["join"]])
    return set(re.findall(r"\b[A-Z]\d*\b|\b(?:[A-Z]\d*)+(?=[,)])", text))


def _constant(network: str) -> str:
    """`WanModel` → `WAN_MODEL`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", network).upper()
