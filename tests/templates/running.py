"""What the tests that run ComfyUI's templates share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.comfyui.latents import read_latent
from tests.comfyui.server import ComfyServer, Graph


def templates_folder() -> Path:
    """The folder of comfyui-workflow-templates-json that COMFYUI_TEMPLATES names, or a skip."""
    named = os.environ.get("COMFYUI_TEMPLATES")
    if not named:
        pytest.skip("no templates (set COMFYUI_TEMPLATES to the folder of comfyui-workflow-templates-json)")
    found = Path(named)
    return found / "templates" if (found / "templates").is_dir() else found


def latents(server: ComfyServer, graph: Graph, **knobs: Any) -> dict[str, Tensor]:
    """What leaves each sampler. Knobs are SP Config's."""
    for node in graph.values():
        if node["class_type"] == "SPConfig":
            node["inputs"] |= knobs
    result = server.run(graph, timeout=300)
    return {name: read_latent(server, result, name) for name in graph if name.startswith("saved ")}
