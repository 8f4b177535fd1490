"""ComfyUI's own templates with tiny files, run from the page: what *Run* sends is made small on its way."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

from PIL import Image

from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.server import ComfyServer, Graph
from tests.templates.families import quantised_as
from tests.templates.prompts import networks, small
from tests.templates.workflow import as_prompt, read

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

STAND_INS = {"sp-template-stand-ins": REPOSITORY / "tests" / "templates" / "stand_ins"}
"""A pack for the server."""
_LORAS = ("LoraLoaderModelOnly", "LoraLoader")
_SEEDS = ("seed", "noise_seed")


def family(prompt: Graph) -> str:
    """The key of `TINY` for a template's networks."""
    (key,) = {key for _, _, key in networks(prompt)}
    return key


def write_files(installation: Installation, server: ComfyServer, workflows: dict[str, dict[str, Any]]) -> None:
    """Writes what the workflows' small prompts load."""
    definitions = server.get("/object_info")
    jobs: dict[str, dict[str, Any]] = {}

    def add(folder: str, name: str, kind: str, **job: str) -> None:
        path = str(server.models / folder / name)
        jobs[path] = {"path": path, "kind": kind, **job}

    for workflow in workflows.values():
        prompt = as_prompt(read(workflow, definitions))
        key = family(prompt)
        for folder, name, tiny in networks(prompt):
            kind = "network" if folder == "diffusion_models" else "checkpoint"
            add(folder, name, kind, tiny=tiny, form=quantised_as(name))
        for node in prompt.values():
            inputs = node["inputs"]
            if node["class_type"] in _LORAS:
                add("loras", inputs["lora_name"], "lora", tiny=key)
            elif node["class_type"] == "LatentUpscaleModelLoader":
                add("latent_upscale_models", inputs["model_name"], "upscaler")
            elif node["class_type"] == "LoadImage":
                Image.new("RGBA", (96, 64), (90, 120, 150, 255)).save(server.base / "input" / inputs["image"], "PNG")
    done = subprocess.run(
        [installation.python, "-m", "tests.templates.write_files", installation.path],
        input=json.dumps(list(jobs.values())),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def make_runs_small(page: Page, key: str) -> None:
    """From now on each prompt that this page sends is small, has one seed, and uses two CPU workers.

    Args:
        key: of `TINY`.
    """

    def send(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        for node in body["prompt"].values():
            node["inputs"] |= {name: 7 for name in _SEEDS if isinstance(node["inputs"].get(name), int)}
            if node["class_type"] == "SPConfig":
                node["inputs"]["devices"] = "cpu,cpu"
        body["prompt"] = small(body["prompt"], key)
        route.continue_(post_data=json.dumps(body))

    page.route("**/api/prompt", send)
