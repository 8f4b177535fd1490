"""What saved graphs rely on: the widgets of each node and their order, as ComfyUI tells the front end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import REPOSITORY
from tests.comfyui.locales import own_nodes
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
CONTROL = "control_after_generate"
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")
KINDS = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "COMBO": (str,), "BOOLEAN": (bool,)}

# A widget may be added at the end, never in the middle.
TILES = ["tile_size", "overlap", "temporal_size", "temporal_overlap"]
PUBLISHED = {
    "SPConfig": [
        "devices", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree", "weights", "attention", "on_failure",
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
        return isinstance(value, KINDS[self.kind]) and isinstance(value, bool) == (self.kind == "BOOLEAN")


def widgets_of(node: dict[str, Any]) -> list[Widget]:
    """Of a node in `/object_info`, in the front end's order."""
    widgets = []
    for name, (kind, *more) in (
        item for part in ("required", "optional") for item in node["input"].get(part, {}).items()
    ):
        options = more[0] if more else {}
        kind = "COMBO" if isinstance(kind, list) else kind
        if kind in KINDS and not options.get("forceInput"):
            widgets.append(Widget(name, kind))
            if options.get(CONTROL):
                widgets.append(Widget(CONTROL, "COMBO"))
    return widgets


def test_widgets_keep_their_places(server: ComfyServer) -> None:
    nodes = own_nodes(server.get("/object_info"))
    names = {node_id: [widget.name for widget in widgets_of(node)] for node_id, node in nodes.items()}
    assert {node_id: found[: len(PUBLISHED[node_id])] for node_id, found in names.items()} == PUBLISHED


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_give_our_nodes_the_values_of_their_widgets(server: ComfyServer, path: Path) -> None:
    nodes = own_nodes(server.get("/object_info"))
    ours = [node for node in json.loads(path.read_text())["nodes"] if node["type"] in nodes]
    assert ours, "the graph shows none of the pack's nodes"
    for node in ours:
        widgets, values = widgets_of(nodes[node["type"]]), node["widgets_values"]
        names = [widget.name for widget in widgets]
        assert len(values) == len(widgets), f"{node['type']} has the values {values} for {names}"
        wrong = [(w.name, value) for w, value in zip(widgets, values, strict=True) if not w.accepts(value)]
        assert not wrong, f"{node['type']}: {wrong}"
        declared = [socket["name"] for socket in node["inputs"] if "widget" in socket]
        assert declared == [name for name in names if name != CONTROL], node["type"]
