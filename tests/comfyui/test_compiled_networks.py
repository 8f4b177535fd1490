"""Compiled blocks of ComfyUI's own networks in gloo ranks: as many graphs after four steps as after one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import Installation
from tests.distributed.start_ranks import run_ranks

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(1800)]

GRAPHS = {
    "MiniMax H3, references, masks": 1,
    "LTX-2": 1,
    "LTXV": 1,
    "Z-Image": 1,
    "Wan, a timestep per frame": 1,
    "Wan VACE": 3,
    "FLUX, ControlNet": 2,
    "FLUX.2, clean references": 2,
    "Chroma, masked": 2,
    "HunyuanVideo, padded": 2,
    "HunyuanVideo 1.5": 1,
    "Krea 2": 1,
    "Qwen-Image": 1,
    "Qwen-Image, padded, clean reference": 1,
    "Kandinsky 5": 1,
    "Cosmos Predict 2": 1,
    "Anima": 1,
    "AuraFlow": 2,
    "SD3.5 Medium": 3,
    "Stable Audio 3, inpaint": 1,
    "HiDream": 2,
    "Lens, padded": 1,
    "OmniGen2, references": 1,
    "Boogu, references": 2,
    "Chroma Radiance": 2,
    "Ideogram 4, padded": 1,
    "JoyImage": 1,
    "Mage-Flow, padded, reference": 1,
    "Ovis-Image": 2,
    "SCAIL, pose, reference": 1,
    "SCAIL-2, pose, masks": 1,
    "WanDancer": 1,
    "Wan Camera": 1,
}
"""One for each class of block; the first block of VACE's second list has a layer that the others have not."""


def compiled(
    installation: Installation, folder: Path, world: int, backend: str, *names: str
) -> list[dict[str, dict[str, Any]]]:
    """What each rank has told of each case."""
    arguments = [str(installation.path), backend, *names]
    module = "tests.comfyui.compiled_ranks"
    python = str(installation.python)
    return [json.loads(told) for told in run_ranks(module, world, folder, arguments, timeout=1500, python=python)]


def assert_compiled_once(told: dict[str, Any], graphs: int, allowed: float) -> None:
    first, *others = told["steps"]
    assert {step["failure"] for step in told["steps"]} == {""} and not told["left"]
    assert (first["graphs"], first["breaks"]) == (graphs, 0)
    assert [step["graphs"] for step in others] == [0, 0, 0]
    assert max(step["difference"] for step in told["steps"]) <= allowed


def test_a_network_over_two_unequal_ranks(installation: Installation, tmp_path: Path) -> None:
    """Attention of the whole block, and of a part of it beside an attention that is not split."""
    for told in compiled(installation, tmp_path, 2, "eager", "Z-Image", "Kandinsky 5"):
        assert_compiled_once(told["Z-Image"], 1, 0.0)
        assert_compiled_once(told["Kandinsky 5"], 1, 0.0)


@pytest.mark.parametrize("world", [1, 2])
def test_every_class_is_compiled_once(installation: Installation, tmp_path: Path, world: int) -> None:
    for told in compiled(installation, tmp_path, world, "eager", *GRAPHS):
        for name, graphs in GRAPHS.items():
            # Alone, the first block of these gets its tokens as the patch embedding lays them: another graph.
            assert_compiled_once(told[name], graphs + (world == 1 and name.startswith(("Wan", "SD3"))), 0.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_generated_code_agrees(installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    names = ("MiniMax H3", "Wan", "FLUX", "Z-Image", "Qwen-Image", "LTX-2")
    for told in compiled(installation, tmp_path, 2, "inductor", *names):
        for name in names:
            assert_compiled_once(told[name], 2 if name == "FLUX" else 1, 1e-5)
            assert max(step["difference"] for step in told[name]["steps"][1:]) > 0, "nothing was compiled"


def test_what_cannot_be_one_graph_runs_uncompiled_and_says_why(installation: Installation, tmp_path: Path) -> None:
    for told in compiled(installation, tmp_path, 2, "eager", "Z-Image Omni"):
        steps = told["Z-Image Omni"]["steps"]
        assert all("sort with non-constant keys" in step["failure"] for step in steps)
        assert [step["difference"] for step in steps] == [0.0] * 4
