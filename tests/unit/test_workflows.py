"""The bundled graphs fit the nodes: the front end gives a node its saved widget values by position, not by name."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
CONTROL = "control_after_generate"
TYPES = {"Int": (int,), "Float": (int, float), "String": (str,), "Combo": (str,), "Boolean": (bool,)}
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")

# What graphs that people have saved rely on. A widget may be added at the end, never in the middle.
TILES = ["tile_size", "overlap", "temporal_size", "temporal_overlap"]
PUBLISHED = {
    "SPConfig": [
        "devices", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree", "weights", "attention",
    ],
    "SPLoadDiffusionModel": ["unet_name", "weight_dtype"],
    "SPLoadCheckpoint": ["ckpt_name"],
    "SPFirstBlockCache": ["residual_diff_threshold", "start_percent", "end_percent", "max_consecutive_hits"],
    "SPTeaCache": ["rel_l1_thresh", "start_percent", "end_percent"],
    "SPQuantizeFP8": ["scheme", "skip"],
    "SPTorchCompile": ["mode", "dynamic"],
    "SPSampler": ["seed", CONTROL, "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "SPVAE": TILES,
    "SPVAEDecode": TILES,
    "SPVAEEncode": TILES,
}  # fmt: skip


@dataclass(frozen=True)
class Widget:
    """One value of `widgets_values`."""

    name: str
    kind: str

    def accepts(self, value: Any) -> bool:
        if self.name == CONTROL:
            return value in CONTROL_VALUES
        return isinstance(value, TYPES[self.kind]) and isinstance(value, bool) == (self.kind == "Boolean")


# --- what the nodes want: their schemas, read without ComfyUI -------------------------------------------------------


def read_schemas() -> dict[str, list[Widget]]:
    """Widgets of every node in nodes/, in order."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "nodes").glob("*.py"))]
    shared = {part.name: part for tree in trees for part in tree.body if isinstance(part, ast.FunctionDef)}
    schemas = {}
    for function in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(function, ast.FunctionDef) and function.name == "define_schema":
            schema = next(node for node in ast.walk(function) if _called(node) == "io.Schema")
            arguments = {keyword.arg: keyword.value for keyword in schema.keywords}
            shorthands = {part.name: part for part in function.body if isinstance(part, ast.FunctionDef)}
            inputs = [part for item in arguments["inputs"].elts for part in _expanded(item, shared)]
            widgets = [widget for item in inputs for widget in _widgets(item, shorthands)]
            schemas[ast.literal_eval(arguments["node_id"])] = widgets
    return schemas


def _expanded(item: ast.expr, shared: dict[str, ast.FunctionDef]) -> list[ast.expr]:
    """The inputs that `*tile_inputs(…)` stands for: what a function of nodes/ returns as a list."""
    if not isinstance(item, ast.Starred):
        return [item]
    returned = next(part.value for part in shared[_called(item.value)].body if isinstance(part, ast.Return))
    assert isinstance(returned, ast.List), f"this test cannot read {ast.unparse(item)}"
    return returned.elts


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _widgets(item: ast.expr, shorthands: dict[str, ast.FunctionDef]) -> list[Widget]:
    """`io.Int.Input("steps", …)`, or a call of a function inside `define_schema` that returns such a call."""
    assert isinstance(item, ast.Call), f"line {item.lineno}: this test cannot read {ast.unparse(item)}"
    name, call = item.args[0], item
    if _called(item) in shorthands:
        call = next(part.value for part in shorthands[_called(item)].body if isinstance(part, ast.Return))
    match = re.fullmatch(r"(io\.)?(\w+)\.Input", _called(call))
    assert match, f"line {item.lineno}: this test cannot read {ast.unparse(item)}"
    kind = match[2]
    flags = {keyword.arg for keyword in call.keywords if ast.unparse(keyword.value) not in ("False", "None")}
    if not match[1] or kind not in TYPES or "force_input" in flags:
        return []  # a socket
    widget = Widget(ast.literal_eval(name), kind)
    return [widget, Widget(CONTROL, "Combo")] if CONTROL in flags else [widget]


SCHEMAS = read_schemas()


def test_schemas_are_read():
    assert {"SPConfig", "SPLoadDiffusionModel"} <= set(SCHEMAS)


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_widgets_keep_their_places(node_id: str):
    names = [widget.name for widget in SCHEMAS[node_id]]
    assert names[: len(PUBLISHED[node_id])] == PUBLISHED[node_id]


# --- what the graphs give -------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_our_nodes_get_the_values_of_their_schema(path: Path):
    ours = [node for node in load(path)["nodes"] if node["type"] in PUBLISHED]
    assert ours, "the graph shows none of the pack's nodes"
    for node in ours:
        widgets, values = SCHEMAS[node["type"]], node["widgets_values"]
        names = [widget.name for widget in widgets]
        assert len(values) == len(widgets), f"{node['type']} has the values {values} for {names}"
        wrong = [(w.name, value) for w, value in zip(widgets, values, strict=True) if not w.accepts(value)]
        assert not wrong, f"{node['type']}: {wrong}"
        declared = [socket["name"] for socket in node["inputs"] if "widget" in socket]
        assert declared == [name for name in names if name != CONTROL], node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_links_agree_with_nodes(path: Path):
    graph = load(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"]) and len(links) == len(graph["links"])
    assert graph["last_node_id"] >= max(nodes) and graph["last_link_id"] >= max(links)
    for number, source, output, target, socket, kind in links.values():
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][socket]
        assert number in out["links"] and into["link"] == number
        assert out["type"] == into["type"] == kind
        assert nodes[source]["order"] < nodes[target]["order"]
    used = [number for node in nodes.values() for out in node["outputs"] for number in out["links"] or ()]
    used_by_inputs = [socket["link"] for node in nodes.values() for socket in node["inputs"] if socket["link"]]
    assert sorted(used) == sorted(used_by_inputs) == sorted(links)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_nothing_overlaps(path: Path):
    graph, title = load(path), 30
    boxes = [(n["type"], *n["pos"], n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in graph["nodes"]]
    for i, (a, left, top, right, bottom) in enumerate(boxes):
        for b, left_b, top_b, right_b, bottom_b in boxes[:i]:
            apart = right <= left_b or right_b <= left or bottom <= top_b - title or bottom_b <= top - title
            assert apart, f"{a} overlaps {b}"
        in_groups = [
            group["title"]
            for x, y, width, height, group in ((*group["bounding"], group) for group in graph["groups"])
            if x <= left and y <= top - title and right <= x + width and bottom <= y + height
        ]
        assert len(in_groups) == 1, f"{a} lies in {in_groups}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_has_a_thumbnail(path: Path):
    image = path.with_suffix(".jpg").read_bytes()
    assert image[:3] == b"\xff\xd8\xff" and len(image) <= 100_000
