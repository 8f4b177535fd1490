"""What is refused for its age, and that every place names the same age."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

import pytest

from parallel.doctor import examine
from parallel.errors import UnsupportedError
from parallel.versions import OLDEST_COMFYUI, OLDEST_TORCH, require

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("found", "oldest"),
    [("2.9.0", "2.9"), ("2.9.1+cu128", "2.9"), ("2.13.0+cpu", "2.9"), ("3.0.0.dev20270101", "2.9"), ("0.8.2", "")],
)
def test_new_enough(found: str, oldest: str):
    require("it", found, oldest)


@pytest.mark.parametrize(
    ("found", "oldest"), [("2.8.0+cu128", "2.9"), ("0.8.0", "0.21.0"), ("0.20.1", "0.21.0"), ("0.3", "0.21.0")]
)
def test_too_old(found: str, oldest: str):
    with pytest.raises(UnsupportedError, match=re.escape(f"it is {found}; Sequence Parallel needs {oldest} or newer")):
        require("it", found, oldest)


def test_the_doctor_finds_what_is_too_old(monkeypatch: pytest.MonkeyPatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.0+cu128" if name == "torch" else version(name))
    result, text = examine("cpu,cpu")
    assert not result["ok"] and result["reason"].startswith("torch is 2.8.0+cu128; Sequence Parallel needs ")
    assert text == f"FAIL libraries: {result['reason']}"


def test_the_doctor_asks_for_what_the_nodes_need_and_for_nothing_that_scripts_need(monkeypatch: pytest.MonkeyPatch):
    version = importlib.metadata.version
    asked: list[str] = []

    def of(name: str) -> str:
        asked.append(name)
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of)
    result, text = examine("cpu,cpu")
    assert not result["ok"] and text.startswith("FAIL libraries: ") and "safetensors" in text
    assert asked == ["torch", "safetensors"]


def test_readme_and_registry_say_the_same():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'requires-comfyui = ">={OLDEST_COMFYUI}"\n' in pyproject
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"ComfyUI {OLDEST_COMFYUI} or newer" in readme and f"PyTorch {OLDEST_TORCH} or newer" in readme
    (diffusers,) = re.findall(r'^scripts = .*"diffusers>=(.*?)"', pyproject, re.MULTILINE)
    assert f"diffusers {diffusers} or newer" in readme


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_told_so_at_once(monkeypatch: pytest.MonkeyPatch, platform: str):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(ImportError, match=r"needs Linux.*WSL2"):
        runpy.run_path(str(Path(__file__).parents[2] / "__init__.py"))
