"""Reads a saved workflow as what runs: subgraphs flattened, muted nodes left out, bypassed ones passed through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Definitions = Mapping[str, Any]
"""Node type → what /object_info says of it."""
Path = tuple[Any, ...]
"""Ids of the subgraphs around a node, then its own."""
Origin = tuple[Path, int]
"""An output: of which node, and which one."""

_INPUTS, _OUTPUTS, _NONE = -10, -20, -1
_MUTED, _BYPASSED = 2, 4
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR")
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
_PASSED = ("Reroute", "PrimitiveNode")
_NOTES = ("Note", "MarkdownNote")
_CHANGES = ("seed", "noise_seed")
"""Widgets that have one behind them, which says what they become after a run."""
_AFTER = ("fixed", "increment", "decrement", "randomize", "increment-wrap")


@dataclass
class Node:
    """A node that runs."""

    type: str
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Input → id of another node, and which of its outputs."""
    values: dict[str, Any] = field(default_factory=dict)
    """Widget → value."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Input → type, as the file has it."""
    outputs: list[str] = field(default_factory=list)
    """Types."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """Models that the template names: {"name", "url", "directory"}."""


def read(workflow: Mapping[str, Any], definitions: Definitions) -> dict[str, Node]:
    """The nodes that run, by ids as the front end makes them (`105:6` is node 6 of the subgraph that is node 105).

    Args:
        workflow: as the front end saves it.
        definitions: of the nodes that exist. Of others only the links are read.
    """
    return _Reader(workflow, definitions).nodes()


def as_prompt(nodes: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
    """The same in ComfyUI's API format."""
    return {
        name: {"class_type": node.type, "inputs": node.values | {key: list(link) for key, link in node.links.items()}}
        for name, node in nodes.items()
    }


def model_chains(nodes: Mapping[str, Node]) -> Iterator[tuple[str, str, list[str]]]:
    """Ways that a MODEL goes: (the node that makes it, the last one that takes it, those between, in any order)."""
    for last, node in nodes.items():
        if _gives_models(node) or not any(_may_be_model(node, name) for name in node.links):
            continue
        between: dict[str, dict[str, None]] = {}
        waiting = [(link[0], ()) for name, link in node.links.items() if _may_be_model(node, name)]
        seen = set()
        while waiting:
            name, way = waiting.pop()
            if (name, way) in seen or not _gives_models(nodes[name]):
                continue
            seen.add((name, way))
            sources = [link[0] for key, link in nodes[name].links.items() if _may_be_model(nodes[name], key)]
            sources = [source for source in sources if _gives_models(nodes[source])]
            if not sources:
                between.setdefault(name, {}).update(dict.fromkeys(way))
            waiting += [(source, (*way, name)) for source in sources]
        for first, way in between.items():
            yield first, last, list(way)


def _gives_models(node: Node) -> bool:
    return any(kind == "MODEL" or _any_type(kind) for kind in node.outputs)


def _may_be_model(node: Node, name: str) -> bool:
    kind = node.inputs.get(name, "")
    return "MODEL" in kind.split(",") or _any_type(kind)


def _any_type(kind: str) -> bool:
    return kind == "*" or kind.startswith("COMFY_MATCHTYPE")


class _Reader:
    def __init__(self, workflow: Mapping[str, Any], definitions: Definitions):
        self._definitions = definitions
        subgraphs = list(_subgraphs(workflow))
        self._subgraphs = {subgraph["id"]: subgraph for subgraph in subgraphs}
        self._nodes: dict[Path, Mapping[str, Any]] = {}
        self._modes: dict[Path, int] = {}
        self._links: dict[tuple[Path, int], Origin] = {}
        self._set: dict[str, Path] = {}
        self._shown: dict[tuple[Path, str], Any] = {}
        """Widgets of nodes in subgraphs that have their value outside."""
        self._walk(workflow, (), 0)

    def nodes(self) -> dict[str, Node]:
        found = {}
        for path, node in self._nodes.items():
            if self._modes[path] in (_MUTED, _BYPASSED) or node["type"] in (*self._subgraphs, *_PASSED, *_NOTES):
                continue
            if node["type"] in ("GetNode", "SetNode"):
                continue
            found[_name(path)] = self._made(path, node)
        names = set(found)
        for node in found.values():
            node.links = {name: link for name, link in node.links.items() if link[0] in names}
        return found

    def _made(self, path: Path, node: Mapping[str, Any]) -> Node:
        made = Node(node["type"])
        made.outputs = [str(output.get("type")) for output in node.get("outputs") or []]
        made.files = list((node.get("properties") or {}).get("models") or [])
        made.values = self._values(node)
        for slot, put in enumerate(node.get("inputs") or []):
            name = put["name"]
            made.inputs[name] = str(put.get("type"))
            if (path, name) in self._shown:
                made.values[name] = self._shown[path, name]
            origin = self._source(path, slot)
            if origin is None:
                continue
            source = self._nodes[origin[0]]
            if source["type"] == "PrimitiveNode":
                made.values[name] = source["widgets_values"][0]
            else:
                made.links[name] = (_name(origin[0]), origin[1])
                if (source.get("outputs") or [])[origin[1] : origin[1] + 1] and _any_type(made.inputs[name]):
                    made.inputs[name] = str(source["outputs"][origin[1]].get("type"))
        return made

    def _walk(self, graph: Mapping[str, Any], around: Path, mode: int) -> None:
        for node in graph.get("nodes") or []:
            path = (*around, node["id"])
            self._nodes[path] = node
            self._modes[path] = mode or node.get("mode", 0)
            if node["type"] == "SetNode":
                self._set[node["widgets_values"][0]] = path
        for link in graph.get("links") or []:
            if isinstance(link, dict):
                link = [link[name] for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
            self._links[(*around, link[3]), link[4]] = (*around, link[1]), link[2]
        for node in graph.get("nodes") or []:
            if (subgraph := self._subgraphs.get(node["type"])) is not None:
                path = (*around, node["id"])
                inner = self._modes[path] if self._modes[path] in (_MUTED, _BYPASSED) else 0
                self._walk(subgraph, path, inner)
                self._show(subgraph, path, node)

    def _show(self, subgraph: Mapping[str, Any], path: Path, instance: Mapping[str, Any]) -> None:
        """Values of a subgraph's widgets outside: in the order of its inputs, or as `proxyWidgets` names them."""
        values = instance.get("widgets_values") or []
        targets: dict[int, list[tuple[Path, str]]] = {}
        plain: dict[int, list[tuple[Path, str]]] = {}
        """Inputs without a widget, which take the value, too."""
        inner = {node["id"]: node for node in subgraph["nodes"]}
        for (target, slot), (source, number) in self._links.items():
            if source == (*path, _INPUTS) and (node := inner.get(target[-1])) is not None:
                put = node["inputs"][slot]
                (targets if put.get("widget") else plain).setdefault(number, []).append((target, put["name"]))
        names = [put["name"] for put in subgraph.get("inputs") or []]
        linked = {put["name"] for put in instance.get("inputs") or [] if put.get("link") is not None}
        if len(values) == len(targets):
            for number, value in zip(sorted(targets), values, strict=True):
                for target in targets[number]:
                    if names[number] not in linked:
                        outer = self._shown.get((path, names[number]), value)
                        self._shown[target] = outer
        else:
            proxies = (instance.get("properties") or {}).get("proxyWidgets") or []
            for (number, name), value in zip(proxies, values, strict=False):
                self._shown[(*path, int(number)) if str(number).lstrip("-").isdigit() else path, name] = value
        for number, others in plain.items():
            for first, name in targets.get(number, [])[:1]:
                value = self._shown.get((first, name), self._values(self._nodes[first]).get(name))
                if value is not None and names[number] not in linked:
                    self._shown.update(dict.fromkeys(others, value))

    def _source(self, path: Path, slot: int, depth: int = 0) -> Origin | None:
        """Where an input's value comes from, through everything that does not run."""
        link = self._links.get((path, slot))
        return None if link is None or depth > 100 else self._origin(*link, depth)

    def _origin(self, path: Path, slot: int, depth: int) -> Origin | None:
        if path[-1] == _INPUTS:
            instance = path[:-1]
            subgraph = self._subgraphs[self._nodes[instance]["type"]]
            return self._source(instance, self._slot(instance, subgraph["inputs"][slot]["name"]), depth + 1)
        node = self._nodes.get(path)
        if node is None or self._modes[path] == _MUTED:
            return None
        if node["type"] == "Reroute":
            return self._source(path, 0, depth + 1)
        if node["type"] == "GetNode":
            setter = self._set.get(node["widgets_values"][0])
            return None if setter is None else self._source(setter, 0, depth + 1)
        if self._modes[path] == _BYPASSED:
            return self._bypassed(path, slot, depth)
        if node["type"] in self._subgraphs:
            return self._source((*path, _OUTPUTS), slot, depth + 1)
        return path, slot

    def _slot(self, instance: Path, name: str) -> int:
        names = [put["name"] for put in self._nodes[instance].get("inputs") or []]
        return names.index(name) if name in names else _NONE

    def _bypassed(self, path: Path, slot: int, depth: int) -> Origin | None:
        """The first input of the output's type, that at the same place before others."""
        node = self._nodes[path]
        outputs, inputs = node.get("outputs") or [], node.get("inputs") or []
        if slot >= len(outputs):
            return None
        order = [slot, *(number for number in range(len(inputs)) if number != slot)]
        for number in order:
            if number < len(inputs) and inputs[number].get("type") == outputs[slot].get("type"):
                origin = self._source(path, number, depth + 1)
                if origin is not None:
                    return origin
        return None

    def _values(self, node: Mapping[str, Any]) -> dict[str, Any]:
        values = node.get("widgets_values") or []
        definition = self._definitions.get(node["type"])
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "videopreview"}
        found: dict[str, Any] = {}
        if definition is None:
            return found
        rest = list(values)
        puts = definition["input"]
        _take([*puts.get("required", {}).items(), *puts.get("optional", {}).items()], rest, found, "")
        return found


def _take(puts: list[tuple[str, Any]], rest: list[Any], found: dict[str, Any], prefix: str) -> None:
    """Values in the widgets' order, by name."""
    for name, (kind, *options) in puts:
        told = options[0] if options else {}
        kind = told.get("widgetType", kind)
        dynamic = kind == _DYNAMIC
        if (not isinstance(kind, list) and kind not in _WIDGETS and not dynamic) or told.get("forceInput") or not rest:
            continue
        found[prefix + name] = rest.pop(0)
        if dynamic:
            chosen = next((option for option in told["options"] if option["key"] == found[prefix + name]), None)
            if chosen is not None:
                parts = chosen["inputs"]
                inner = [*parts.get("required", {}).items(), *parts.get("optional", {}).items()]
                _take(inner, rest, found, f"{prefix}{name}.")
        followed = told.get("control_after_generate") or (name in _CHANGES and kind == "INT")
        if rest and ((followed and rest[0] in _AFTER) or (rest[0] in ("image", "video", "audio") and _uploads(told))):
            rest.pop(0)


def _uploads(told: Mapping[str, Any]) -> bool:
    return any(name.endswith("_upload") and value for name, value in told.items())


def _subgraphs(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for subgraph in (graph.get("definitions") or {}).get("subgraphs") or []:
        yield subgraph
        yield from _subgraphs(subgraph)


def _name(path: Path) -> str:
    return ":".join(map(str, path))
