"""The English names and texts of the nodes, as ComfyUI's translations want them.

After a change of a node's texts, with ComfyUI running: `python -m tests.comfyui.locales http://127.0.0.1:8188` writes
`locales/en/nodeDefs.json` again. The other languages are written by hand.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

LOCALES = Path(__file__).parents[2] / "locales"
CATEGORY = "sequence parallel"


def own_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """This pack's part of `/object_info`."""
    return {name: node for name, node in object_info.items() if node["category"] == CATEGORY}


def inputs_of(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Input → its options."""
    declared = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: spec[1] if len(spec) > 1 else {} for name, spec in declared.items()}


def texts_of(node: dict[str, Any]) -> dict[str, Any]:
    """An entry of nodeDefs.json. Inputs keep their names, which messages and help pages use."""
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: {"tooltip": options.get("tooltip", "")} for name, options in inputs_of(node).items()},
    }


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info") as answer:
        nodes = own_nodes(json.load(answer))
    written = {name: texts_of(node) for name, node in sorted(nodes.items())}
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
