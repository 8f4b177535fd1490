"""A LoRA on scaled fp8 gives the workers ComfyUI's own weights and scales, to the bit."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.comfyui.installation import REPOSITORY, Installation

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("patched_weights.py")


@pytest.mark.parametrize("all_models", [False, pytest.param(True, marks=pytest.mark.extended)], ids=["one", "all"])
def test_scaled_weights_and_their_scales_are_the_native_ones(
    installation: Installation, tmp_path: Path, all_models: bool
) -> None:
    """In every layout for HunyuanVideo; for eight others in the newest, in both kinds of fp8."""
    drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    run = subprocess.run(
        [installation.python, SCRIPT, installation.path, REPOSITORY, tmp_path, *(["all"] if all_models else [])],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in drop},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results: dict[str, list[int]] = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 5 + 8 * 2 * all_models
    for case, (patched, scaled, different) in results.items():
        assert patched and scaled and not different, f"{case}: {different} of {patched} differ, {scaled} are scaled"
