"""The contract against the ComfyUI that is installed: its files, a copy with other names in it, and as it runs."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from parallel.__main__ import main
from parallel.comfyui.contract import PARTS, symbols
from tests.comfyui.contract_in_process import KEY
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.server import AT_START

pytestmark = pytest.mark.comfyui

RENAMED = {
    ("comfy/utils.py", "def convert_old_quants(", "def convert_quants("): "comfy.utils.convert_old_quants is missing",
    ("comfy/samplers.py", "class KSampler:", "class Sampling:"): "comfy.samplers.KSampler is missing",
    ("comfy/model_patcher.py", "def set_injections(", "def set_code("): (
        "comfy.model_patcher.ModelPatcher.set_injections is missing"
    ),
    ("comfy/sd.py", "output_model=True, model_options", "with_model=True, model_options"): (
        "comfy.sd.load_checkpoint_guess_config: got an unexpected keyword argument 'output_model'"
    ),
    ("comfy/utils.py", "PROGRESS_BAR_HOOK = None", "PROGRESS_HOOK = None"): "comfy.utils.PROGRESS_BAR_HOOK is missing",
}
"""A function, a class, a method, a parameter, a constant: file, text, what it becomes → what is found."""


def test_the_installed_comfyui_has_all_that_the_pack_relies_on(
    installation: Installation, capsys: pytest.CaptureFixture[str]
):
    assert main(["contract", str(installation.path)]) == 0
    assert capsys.readouterr().out.strip() == f"{installation.path}: fits"


def test_what_is_renamed_is_found_and_nothing_else(installation: Installation, tmp_path: Path):
    from parallel.comfyui.contract_command import hold

    files = {symbol.module.replace(".", "/") for part in PARTS.values() for symbol in symbols(part)}
    for name in files:
        for source in (installation.path / f"{name}.py", *(installation.path / name).glob("*.py")):
            if source.is_file():
                copy = tmp_path / source.relative_to(installation.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(source.read_text())
    found, _, status = hold([str(tmp_path)])
    assert (found[str(tmp_path)], status) == ({}, 0)
    for name, text, other in RENAMED:
        source = (tmp_path / name).read_text()
        assert text in source, f"this ComfyUI has no {text!r} in {name}: rename another symbol of its kind"
        (tmp_path / name).write_text(source.replace(text, other, 1))
    found, text, status = hold([str(tmp_path)])
    assert set(found[str(tmp_path)]) == set(RENAMED.values()) and status == 1
    assert "Sampler (SP)" in text and "Load Checkpoint (SP)" in text


@pytest.fixture(scope="module")
def told(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("contract")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "VIRTUAL_ENV")}
    ended = subprocess.run(
        [
            installation.python,
            Path(__file__).with_name("contract_in_process.py"),
            installation.path,
            REPOSITORY,
            folder,
        ],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(AT_START)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_running_comfyui_is_checked_in_no_time(told: dict[str, Any]):
    assert told["found"] == {} and told["unlisted"] == []
    assert told["check"] < told["imports"] / 50
    (line,) = told["renamed"]
    assert line.startswith("comfy.utils.load_torch_file is missing (affects Load Diffusion Model (SP)")


@pytest.mark.slow
def test_an_attention_that_a_file_chooses_is_honoured_where_comfyui_knows_it_and_else_set_aside(told: dict[str, Any]):
    assert told["newer"] == {
        "log": [],
        "choices": {"blocks.0.attn.comfy_attention": {"attention": "comfy_kitchen_int8"}},
    }
    assert told["older"]["choices"] == {}
    (line,) = told["older"]["log"]
    assert "chooses.safetensors chooses the attention of 1 modules, which this ComfyUI does not know" in line


def test_an_attention_that_a_lora_chooses_is_refused_by_name(told: dict[str, Any]):
    assert told["refused"].startswith(f"a LoRA that chooses the attention of diffusion_model.{KEY} cannot be used with")


def test_clones_take_what_newer_versions_hand_on(told: dict[str, Any]):
    assert told["fast_disk"] is True
