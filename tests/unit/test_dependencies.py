"""Which packages of the engine may import which, and who imports ComfyUI."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "parallel"
ALLOWED = {
    "attention": {"config", "errors", "mesh", "plan"},
    "cache": {"degrees", "errors", "plan", "split"},
    "split": {"attention", "errors", "plan"},
    "plans": {"errors", "split"},
    "comfyui": {"checkpoints", "errors", "plans", "vae"},
}
"""Package → what of the engine it may import besides itself."""


def imported(file: Path) -> Iterator[str]:
    """Modules, those of the engine as `parallel.…`."""
    package = ("parallel", *file.relative_to(ENGINE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module == "parallel" else [module])


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_down(package: str):
    files = sorted((ENGINE / package).rglob("*.py"))
    assert files
    for file in files:
        found = {name.split(".")[1] for name in imported(file) if name.startswith("parallel.")}
        assert found <= ALLOWED[package] | {package}, f"{file.name} imports {sorted(found - ALLOWED[package])}"


def test_only_one_package_imports_comfyui():
    importing = {
        file.relative_to(ENGINE).parts[0]
        for file in ENGINE.rglob("*.py")
        if any(name.partition(".")[0] == "comfy" for name in imported(file))
    }
    assert importing == {"comfyui"}
