"""The bundled graphs: links, places, thumbnails; `tests/comfyui/test_widgets.py` has their widgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_workflows():
    assert WORKFLOWS


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
