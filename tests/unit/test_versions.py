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
from parallel.versions import OLDEST_COMFYUI, OLDEST_TORCH, conflicts, require

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


@pytest.mark.parametrize(("name", "old"), [("torch", "2.8.0+cu128"), ("diffusers", "0.38.0")])
def test_the_doctor_finds_what_is_too_old(monkeypatch: pytest.MonkeyPatch, name: str, old: str):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda other: old if other == name else version(other))
    result, text = examine("cpu,cpu")
    assert not result["ok"] and result["reason"].startswith(f"{name} is {old}; Sequence Parallel needs ")
    assert text == f"FAIL libraries: {result['reason']}"


def test_the_doctor_finds_packages_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch):
    assert list(conflicts()) == []
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.36.2" if name.startswith("huggingface") else version(name)
    )
    result, text = examine("cpu,cpu")
    assert not result["ok"]
    assert re.match(r"FAIL libraries: diffusers \S+ needs huggingface[-_]hub\S+, and 0\.36\.2 is installed", text)


def test_readme_and_registry_say_the_same():
    assert f'requires-comfyui = ">={OLDEST_COMFYUI}"\n' in (ROOT / "pyproject.toml").read_text()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"ComfyUI {OLDEST_COMFYUI} or newer" in readme and f"PyTorch {OLDEST_TORCH} or newer" in readme
    (diffusers,) = re.findall(r"^diffusers>=(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"diffusers {diffusers} or newer" in readme


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_told_so_at_once(monkeypatch: pytest.MonkeyPatch, platform: str):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(ImportError, match=r"needs Linux.*WSL2"):
        runpy.run_path(str(Path(__file__).parents[2] / "__init__.py"))
