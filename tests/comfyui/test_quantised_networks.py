"""Quantised files of networks of ComfyUI's own classes: its own bits on one worker, and how near two are."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.server import AT_START

pytestmark = pytest.mark.comfyui

SCRIPT = Path(__file__).with_name("quantised_networks.py")
ALLOWED = 1e-5


@pytest.fixture(scope="module")
def results(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    drop = {"PYTHONHOME", "VIRTUAL_ENV"}
    folder = tmp_path_factory.mktemp("quantised")
    run = subprocess.run(
        [installation.python, SCRIPT, installation.path, REPOSITORY, folder, "cpu", "cpu,cpu"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key not in drop} | {"PYTHONPATH": str(AT_START)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 18
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_worker_has_comfyuis_bits(results: dict[str, dict[str, Any]]) -> None:
    for name, told in results.items():
        assert told["rounding"] > 1e-3, f"{name}: nothing is rounded"
        assert told["cpu"] == 0, f"{name}: {told['cpu']}"


@pytest.mark.slow
def test_two_workers_are_as_near_as_the_format_allows(results: dict[str, dict[str, Any]]) -> None:
    """int8 rounds activations: there an input that moves by 3e-7 moves the result by as much as the split does."""
    for name, told in results.items():
        allowed = 4 * told["sensitivity"] if "int8" in name else ALLOWED
        assert told["cpu,cpu"] <= allowed, f"{name}: {told['cpu,cpu']}, sensitivity {told['sensitivity']}"


@pytest.mark.slow
def test_a_lora_gives_comfyuis_bits(results: dict[str, dict[str, Any]]) -> None:
    """Quantised layers are patched and quantised again by ComfyUI's own code."""
    for name, told in results.items():
        assert told["lora changes"] > 1e-3, name
        assert told["lora"] == 0, f"{name}: {told['lora']}"


@pytest.mark.slow
def test_files_that_are_quantised_are_not_quantised_again(results: dict[str, dict[str, Any]]) -> None:
    for name, told in results.items():
        if name in ("krea2 bfloat16", "krea2 as fp8_e4m3fn"):
            assert told["fp8"] == (24 if "fp8" in name else 0), name
        else:
            assert re.search(r"FP8 Quantize .* quantised already \((int8|float8|nvfp4|mxfp8)", str(told["fp8"])), name


@pytest.mark.slow
def test_a_scale_over_all_tokens_is_refused_where_a_device_computes_in_it(results: dict[str, dict[str, Any]]) -> None:
    """On a CPU nvfp4 is dequantised, so that nothing depends on other tokens."""
    for name, told in results.items():
        refused = {key for key in told if key.endswith("with nvfp4")}
        assert refused == ({"cpu,cpu with nvfp4"} if "nvfp4" in name else set()), name
        for key in refused:
            assert "nvfp4 without an input_scale" in told[key] and "blocks.0." in told[key], told[key]
