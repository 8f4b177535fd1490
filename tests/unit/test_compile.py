"""Compiled blocks: settings, the folder, and what is told of them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.compilation.folder import VARIABLE, use_folder
from parallel.compilation.settings import MODES, CompileSettings
from parallel.errors import ConfigError
from parallel.host.compiled_sampling import CompiledSampling

# --- settings and folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "reduce-overhead"}, "mode is 'reduce-overhead'; allowed are default, max-autotune-no-cudagraphs"),
        ({"dynamic": 1}, "dynamic is 1; allowed are True and False"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CompileSettings(**settings)


@pytest.mark.parametrize("mode", MODES)
def test_settings_survive_json_and_are_known_to_the_compiler(mode: str):
    settings = CompileSettings(mode=mode, dynamic=False)
    assert CompileSettings(**json.loads(json.dumps(settings.to_json()))) == settings
    assert not any("cudagraph" in name for name in torch._inductor.list_mode_options(mode))


def test_the_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = use_folder()
    assert folder.is_relative_to(tmp_path) and folder.stat().st_mode & 0o777 == 0o700
    assert os.environ[VARIABLE] == str(folder)
    monkeypatch.delenv(VARIABLE)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=f"others can write to {folder}; set {VARIABLE}"):
        use_folder()
    folder.chmod(0o700)
    monkeypatch.setenv(VARIABLE, f"{tempfile.gettempdir()}/torchinductor_somebody")  # as PyTorch itself sets it
    assert use_folder() == folder
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert use_folder() == tmp_path / "mine"


# --- what is told -------------------------------------------------------------------------------------------------


def told(**changes: Any) -> dict[str, Any]:
    plain = {"seconds": 0.0, "graphs": 0, "breaks": 0, "recompilations": 0, "kinds": 2, "failure": ""}
    return {"compile": plain | changes}


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (
            [
                [told(seconds=2.0, graphs=2), told(seconds=3.0, graphs=2)],
                [told(), told(seconds=1.5, graphs=1, recompilations=1)],
            ],
            "2 kinds of blocks, 3 graphs compiled in 4.5 s (slowest worker); 0 graph breaks, 1 recompilation",
        ),
        ([[told(), told()]], "2 kinds of blocks, compiled before"),
        (
            [[told(), told(failure="InvalidCxxCompiler: none")]],
            "WARNING: not compiled on worker rank 1: InvalidCxxCompiler: none",
        ),
        ([], "no step has run"),
        ([[told(kinds=0)]], "WARNING: not compiled: the blocks of this network cannot be compiled"),
    ],
)  # fmt: skip
def test_the_report_names_ranks_and_causes(steps: list[list[dict[str, Any]]], text: str):
    sampling = CompiledSampling(CompileSettings())
    for results in steps:
        sampling.count(results)
    assert str(sampling.report) == f"Torch Compile (SP): {text}"
