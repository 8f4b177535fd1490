"""ComfyUI's own templates with tiny files: after the one-click conversion they sample what they sampled before.

Each is taken as it is shipped, made small (`prompts.py` says what is replaced and left out), and run in a server over
HTTP, native and converted. What leaves each sampler is compared: on one worker it has the native one's bits; two
workers differ by 10⁻⁵ at most, but for formats that round activations, where the result says only how near they are.

COMFYUI_TEMPLATES names the folder of comfyui-workflow-templates-json, unpacked.
"""

from __future__ import annotations

import json
import os
import subprocess
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from parallel.plans.comfyui import PLANS
from tests.comfyui.fixtures import PACKS, require_pack
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.latents import relative_difference
from tests.comfyui.server import AT_START, ComfyServer, Graph
from tests.templates.families import family_of, quantised_as
from tests.templates.prompts import networks, small, with_lora
from tests.templates.proven import PROVEN
from tests.templates.running import latents, templates_folder
from tests.templates.walk import converted
from tests.templates.workflow import as_prompt, read

pytestmark = [pytest.mark.comfyui, pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(900)]

ALLOWED = 1e-5
"""Relative, of two workers."""
ROUNDED = 0.02
"""The same where activations are rounded: there an input that moves by 3e-7 moves the result by 3e-3 at each step."""
LORAS = {"LoraLoaderModelOnly": "lora_name", "LoraLoader": "lora_name"}
_LTX = ("LTX-2.3", "LTX-2.5")


@dataclass(frozen=True)
class Case:
    """A template before and after the conversion, small."""

    native: Graph
    converted: Graph
    changed: Graph
    """The native one with another network."""
    quantised: tuple[str, ...]
    """How its networks' files are."""
    planned: bool
    """Their class has a plan."""


@dataclass(frozen=True)
class Proofs:
    """A server with the files of all templates."""

    server: ComfyServer
    cases: dict[str, Case]


@pytest.fixture(scope="module")
def proofs(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proofs]:
    templates = templates_folder()
    chosen = [name for name in os.environ.get("TEMPLATE", "").split(",") if name] or PROVEN
    folder = tmp_path_factory.mktemp("templates")
    for name in chosen:
        (folder / f"{name}.json").symlink_to(templates / f"{name}.json")
    base = tmp_path_factory.mktemp("comfyui")
    packs = PACKS | {"sp-template-stand-ins": Path(__file__).parent / "stand_ins"}
    with ComfyServer(installation, base, packs) as server:
        require_pack(server)
        definitions = server.get("/object_info")
        after, _ = converted(folder, server.url)
        cases: dict[str, Case] = {}
        jobs: dict[str, dict[str, Any]] = {}
        for name in chosen:
            before = as_prompt(read(json.loads((folder / f"{name}.json").read_text()), definitions))
            files = list(networks(before))
            keys = {key for _, _, key in files}
            assert len(keys) == 1, f"{name}: {keys}"
            (key,) = keys
            jobs |= {job["path"]: job for job in _jobs(before, key, base)}
            _write_inputs(before, base / "input")
            native = small(before, key)
            cases[name] = Case(
                native,
                small(as_prompt(read(after[f"{name}.json"], definitions)), key),
                with_lora(native, _changing(key)),
                tuple(quantised_as(file) for _, file, _ in files),
                all(family_of(file).network in PLANS for _, file, _ in files),
            )
        _write_files(installation, list(jobs.values()))
        yield Proofs(server, cases)


def _jobs(prompt: Graph, key: str, base: Path) -> Iterator[dict[str, Any]]:
    models = base / "models"
    yield {"path": str(models / "loras" / _changing(key)), "kind": "lora", "tiny": key}
    for folder, name, tiny in networks(prompt):
        kind = "network" if folder == "diffusion_models" else "checkpoint"
        yield {"path": str(models / folder / name), "kind": kind, "tiny": tiny, "form": quantised_as(name)}
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in LORAS:
            yield {"path": str(models / "loras" / inputs["lora_name"]), "kind": "lora", "tiny": key}
        elif kind == "LatentUpscaleModelLoader":
            yield {"path": str(models / "latent_upscale_models" / inputs["model_name"]), "kind": "upscaler"}
        elif kind == "VAELoader" and key in _LTX:
            yield {"path": str(models / "vae" / inputs["vae_name"]), "kind": "ltx vae"}
        elif kind == "LoadVideo":
            yield {"path": str(base / "input" / inputs["file"]), "kind": "video"}


def _changing(key: str) -> str:
    return f"changes {key}.safetensors"


def _write_files(installation: Installation, jobs: list[dict[str, Any]]) -> None:
    done = subprocess.run(
        [installation.python, "-m", "tests.templates.write_files", installation.path],
        input=json.dumps(jobs),
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(AT_START)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _write_inputs(prompt: Graph, folder: Path) -> None:
    """Pictures and sounds that the template loads, small, of noise."""
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            pixels = torch.randint(0, 255, (64, 96, 4), generator=torch.Generator().manual_seed(len(node["inputs"])))
            pixels[..., 3] = 255
            pixels[16:48, 32:64, 3] = 0  # a hole, for what takes the mask
            Image.fromarray(pixels.byte().numpy()).save(folder / node["inputs"]["image"], format="PNG")
        elif node["class_type"] == "LoadAudio":
            with wave.open(str(folder / node["inputs"]["audio"]), "wb") as file:
                file.setparams((2, 2, 16000, 0, "NONE", ""))
                file.writeframes(bytes(range(256)) * 200)


@pytest.mark.parametrize("template", [pytest.param(name, id=name) for name in PROVEN])
def test_the_template_samples_the_same(proofs: Proofs, template: str) -> None:
    if template not in proofs.cases:
        pytest.skip("not among those that TEMPLATE names")
    server, case = proofs.server, proofs.cases[template]
    loaders = {node["class_type"] for node in case.converted.values()} & {"SPLoadDiffusionModel", "SPLoadCheckpoint"}
    assert loaders, "nothing is converted"
    native = latents(server, case.native)
    changed = latents(server, case.changed)
    assert all(relative_difference(changed[name], native[name]) > 1e-3 for name in native), "the network hardly counts"
    one = latents(server, case.converted, devices="cpu")
    two = latents(server, case.converted, devices="cpu,cpu", ulysses_degree=2 if case.planned else 0)
    sent = [group["step"]["bytes_sent"] for group in server.get("/sequence_parallel/status")["groups"]]
    assert any(sent) == case.planned, "nothing was split" if case.planned else "there is no plan"
    off = {name: [relative_difference(other[name], native[name]) for other in (one, two, changed)] for name in native}
    allowed = ROUNDED if "int8_convrot" in case.quantised else ALLOWED
    assert max(one for one, *_ in off.values()) == 0, off
    assert max(two for _, two, _ in off.values()) <= allowed, off
