"""The files that ComfyUI, its Manager and the registry read agree with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[str]:
    lines = (line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_both_requirement_lists_are_equal():
    assert PYPROJECT["project"]["dependencies"] == requirements()


def test_no_requirement_replaces_torch_or_caps_a_shared_package():
    for requirement in requirements():
        assert not re.match(r"(torch|torchvision|torchaudio|triton|nvidia.*)\b", requirement, re.IGNORECASE)
        assert not re.search(r"==|~=|<", requirement)


def test_changelog_knows_this_version():
    assert f"## [{PYPROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pytest_stays_out_of_the_root_package():
    """With either of these files it would import the root, which needs ComfyUI."""
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
