"""Which packages of the engine may import which, and who imports ComfyUI and diffusers."""

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
    "compilation": {"errors", "split"},
    "quantise": {"config", "errors", "split"},
    "comfyui": {"diffusers", "errors", "headers", "plans", "split", "vae", "versions"},
    "diffusers": {"config", "errors", "headers", "host", "plans", "quantise", "sampling", "split", "versions", "wire"},
    "sampling": {"errors", "wire"},
    "vae": {"errors"},
    "wire": {"compilation", "degrees", "errors"},
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


@pytest.mark.parametrize(("library", "packages"), [("comfy", {"comfyui"}), ("diffusers", {"demo", "diffusers"})])
def test_a_library_is_imported_in_its_own_package(library: str, packages: set[str]):
    """The demo decodes its video with a VAE of diffusers'."""
    importing = {
        file.relative_to(ENGINE).parts[0]
        for file in ENGINE.rglob("*.py")
        if any(name.partition(".")[0] == library for name in imported(file))
    }
    assert importing == packages


def test_models_of_comfyuis_need_nothing_that_needs_diffusers():
    """Only how a folder's tensors are mapped, which needs no library."""
    found = {name for file in (ENGINE / "comfyui").rglob("*.py") for name in imported(file)}
    assert {name for name in found if name.startswith("parallel.diffusers")} == {"parallel.diffusers.tensors"}
    assert not {name for name in imported(ENGINE / "diffusers" / "tensors.py") if name.startswith("parallel.diffusers")}
