"""The bundled templates: each fits the nodes that there are, and those of the newest models sample as native graphs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.comfyui.fixtures import PACKS, require_pack
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.latents import relative_difference
from tests.comfyui.server import ComfyServer, Graph
from tests.comfyui.test_widgets import CONTROL, WORKFLOWS, widgets_of
from tests.templates.families import quantised_as
from tests.templates.prompts import networks, small
from tests.templates.running import latents
from tests.templates.workflow import Definitions, as_prompt, read

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

ALLOWED, ROUNDED = 1e-5, 0.02
"""Relative, of two workers; the second where files round activations."""
FAMILIES = {
    "flux_tea_cache_t2i": "FLUX.1",
    "krea_2_turbo_t2i": "Krea 2",
    "ltx_2_3_t2v": "LTX-2.3",
    "minimax_h3_t2v": "MiniMax-H3",
    "wan_v2v": "Wan 2.1, 2.2",
    "z_image_turbo_t2i": "Z-Image",
}
"""Template → key of `tests.templates.tiny.TINY`."""
PLAIN = ("z_image_turbo_t2i",)
"""Those that CI samples; the others are extended."""
NATIVE = {
    "SPLoadDiffusionModel": "UNETLoader",
    "SPLoadCheckpoint": "CheckpointLoaderSimple",
    "SPVAEEncode": "VAEEncodeTiled",
}
FRAMES = 5
FILES = ("unet_name", "vae_name")
"""Widgets that name what the user has: some templates take a folder, or a file that is not published as such."""


def template(name: str, definitions: Definitions) -> Graph:
    return as_prompt(read(json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text()), definitions))


def natively(prompt: Graph) -> Graph:
    """With ComfyUI's own nodes, and without a cache."""
    made = {}
    for name, node in prompt.items():
        inputs = {key: value for key, value in node["inputs"].items() if key != "sp_config"}
        made[name] = {"class_type": NATIVE.get(node["class_type"], node["class_type"]), "inputs": inputs}
    for name in [name for name, node in made.items() if node["class_type"] == "SPTeaCache"]:
        source = made.pop(name)["inputs"]["model"]
        for node in made.values():
            node["inputs"] = {key: source if value == [name, 0] else value for key, value in node["inputs"].items()}
    return {name: node for name, node in made.items() if node["class_type"] != "SPConfig"}


def small_template(prompt: Graph, name: str) -> Graph:
    """Its samplers with tiny sizes; a video is encoded by a real VAE."""
    made = small(prompt, FAMILIES[name])
    for node in made.values():
        if node["class_type"] == "SPTemplateVAE" and name == "wan_v2v":
            node |= {"class_type": "SPTestRandomVAE", "inputs": {"kind": "wan_2_1", "seed": 0}}
        elif node["class_type"] == "ImageScale":
            node["inputs"] |= {"width": 64, "height": 48}
        elif node["class_type"] == "ImageFromBatch":
            node["inputs"] |= {"length": FRAMES}
    return made


@pytest.fixture(scope="module")
def templates(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with tiny files under the names that the templates have, and a video to load."""
    stand_ins = {"sp-template-stand-ins": REPOSITORY / "tests" / "templates" / "stand_ins"}
    with ComfyServer(installation, tmp_path_factory.mktemp("comfyui"), PACKS | stand_ins) as server:
        require_pack(server)
        definitions = server.get("/object_info")
        jobs = [job for name in FAMILIES for job in _jobs(natively(template(name, definitions)), name, server.models)]
        done = subprocess.run(
            [installation.python, "-m", "tests.templates.write_files", installation.path],
            input=json.dumps(jobs), cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        _write_video(server)
        yield server


def _jobs(prompt: Graph, name: str, models: Path) -> Iterator[dict[str, Any]]:
    for folder, file, _ in networks(prompt):
        kind = "network" if folder == "diffusion_models" else "checkpoint"
        form = quantised_as(file)
        yield {"path": str(models / folder / file), "kind": kind, "tiny": FAMILIES[name], "form": form}
    for node in prompt.values():
        if node["class_type"] == "LoraLoaderModelOnly":
            yield {"path": str(models / "loras" / node["inputs"]["lora_name"]), "kind": "lora", "tiny": FAMILIES[name]}


def _write_video(server: ComfyServer) -> None:
    """A moving picture of noise where Load Video looks for it."""
    pixels = torch.randint(0, 255, (48, 64, 3), generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.byte().numpy()).save(server.base / "input" / "noise.png")
    graph = {
        "0": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "1": {"class_type": "RepeatImageBatch", "inputs": {"image": ["0", 0], "amount": FRAMES}},
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 16.0}},
        "3": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["2", 0], "filename_prefix": "made", "format": "auto", "codec": "auto"},
        },
    }
    result = server.run(graph)
    assert result.status == "success", result.message
    (file,) = (server.base / "output").glob("made*.mp4")
    shutil.copy(file, server.base / "input" / "video.mp4")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_widget_and_link_fits_its_node(server: ComfyServer, path: Path) -> None:
    """As this ComfyUI describes its nodes; files are the user's."""
    definitions = server.get("/object_info")
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] == "MarkdownNote":
            continue
        assert node["type"] in definitions, node["type"]
        known = definitions[node["type"]]
        inputs = known["input"].get("required", {}) | known["input"].get("optional", {})
        files = {model["name"] for model in node["properties"].get("models", [])} | {"video.mp4", "example.png"}
        widgets = [widget for widget in widgets_of(known)]
        values = [value for value in node.get("widgets_values") or [] if value != "image"]
        for widget, value in zip(widgets, values, strict=False):
            place = f"{node['type']}.{widget.name}: {value!r}"
            assert widget.accepts(value), place
            kind, *told = inputs.get(widget.name, ("",))
            options = kind if isinstance(kind, list) else (told[0] if told else {}).get("options")
            if widget.name not in (CONTROL, *FILES) and options is not None and value not in files:
                assert value in options, place
        for number, put in enumerate(node["inputs"]):
            known_here = put["name"] in inputs or "." in put["name"] or put["name"] == "upload"
            assert known_here, f"{node['type']} has no input {put['name']}"
            if put["link"] is not None:
                _, source, slot, target, place, kind = next(x for x in workflow["links"] if x[0] == put["link"])
                assert (target, place) == (node["id"], number)
                assert definitions[nodes[source]["type"]]["output"][slot] == kind
    known_types = {node["type"] for node in nodes.values()}
    assert known_types & {"SPLoadDiffusionModel", "SPLoadCheckpoint"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_note_names_every_file_and_the_page(name: str) -> None:
    workflow = json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text())
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    files = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert files and re.search(r"\]\(https://huggingface\.co/[\w.-]+/[\w.-]+\)", note)
    for file in files:
        (line,) = (line for line in note.splitlines() if line.startswith(f"**{file['directory']}**"))
        assert file["name"] in line
        assert file["url"].startswith("https://huggingface.co/") and file["url"].endswith(f"/{file['name']}")


def test_every_node_of_this_pack_is_shown() -> None:
    shown = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text())["nodes"]}
    assert shown >= {
        "SPTeaCache",
        "SPVAEEncode",
        "SPFirstBlockCache",
        "SPVAEDecode",
        "SPVAE",
        "SPSampler",
        "SPQuantizeFP8",
    }


@pytest.mark.parametrize(
    "name", [name if name in PLAIN else pytest.param(name, marks=pytest.mark.extended) for name in FAMILIES]
)
def test_it_samples_as_the_native_graph(templates: ComfyServer, name: str) -> None:
    """Bit by bit on one worker. TeaCache with the threshold 0, which never skips."""
    prompt = template(name, templates.get("/object_info"))
    for node in prompt.values():
        if node["class_type"] == "SPTeaCache":
            node["inputs"]["rel_l1_thresh"] = 0.0
    graph = small_template(prompt, name)
    native = latents(templates, small_template(natively(prompt), name))
    assert native and all(latent.isfinite().all() and latent.std() > 0.01 for latent in native.values())
    one, two = latents(templates, graph, devices="cpu"), latents(templates, graph, devices="cpu,cpu")
    rounded = any(quantised_as(file) == "int8_convrot" for _, file, _ in networks(natively(prompt)))
    for saver, expected in native.items():
        assert torch.equal(one[saver], expected), relative_difference(one[saver], expected)
        assert relative_difference(two[saver], expected) <= (ROUNDED if rounded else ALLOWED)


def told(server: ComfyServer, start: int) -> str:
    return " ".join(event.data["bytes"].decode(errors="replace") for event in server.events("binary 3", since=start))


def test_tea_cache_tells_what_it_skipped(templates: ComfyServer) -> None:
    graph = small_template(template("flux_tea_cache_t2i", templates.get("/object_info")), "flux_tea_cache_t2i")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 12
        elif node["class_type"] == "SPTeaCache":
            node["inputs"]["rel_l1_thresh"] = 10.0
    start = templates.mark()
    (latent,) = latents(templates, graph, devices="cpu,cpu").values()
    assert latent.isfinite().all()
    assert re.search(r"TeaCache \(SP\): skipped the blocks in [1-9]\d* of 12", told(templates, start))


def test_all_devices_encode_the_video(templates: ComfyServer) -> None:
    graph = small_template(template("wan_v2v", templates.get("/object_info")), "wan_v2v")
    for node in graph.values():
        if node["class_type"] == "ImageScale":  # larger than a tile
            node["inputs"] |= {"width": 80}
        if node["class_type"] == "SPVAEEncode":
            node["inputs"] |= {"tile_size": 64, "overlap": 16}
    start = templates.mark()
    latents(templates, graph, devices="cpu,cpu")
    assert re.search(r"[2-9] tiles on cpu,cpu in", told(templates, start)), told(templates, start)
