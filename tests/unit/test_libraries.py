"""What a worker imports, when, and what it says where that fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from parallel.errors import UnsupportedError
from parallel.worker import libraries as module
from parallel.worker.libraries import Libraries, library_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FLUX = {"library": "diffusers", "network": "FluxTransformer2DModel", "path": "/nowhere", "options": {}}
COMFYUIS = FLUX | {"library": "comfyui", "network": "Flux", "options": {"root": "/ComfyUI"}}
STARTED = """
import sys
import parallel.worker.loop
from parallel import numerics
numerics.apply(numerics.read())
unwanted = ("comfy", "diffusers", "transformers", "torch._dynamo", "torch._inductor")
print([name for name in unwanted if name in sys.modules])
"""


@pytest.fixture
def diffusers_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Takes what happens when diffusers is imported."""
    original = importlib.import_module

    def take(happens: Callable[[], Any]) -> None:
        def import_module(name: str, package: str | None = None) -> Any:
            return happens() if name == "diffusers" else original(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return take


def fail() -> Any:
    raise RuntimeError("Failed to import diffusers.loaders.peft")


def test_what_cannot_be_imported_is_told_with_the_versions(diffusers_is: Any) -> None:
    diffusers_is(fail)
    with pytest.raises(UnsupportedError) as caught:
        library_of(FLUX)
    said = str(caught.value)
    assert "RuntimeError: Failed to import diffusers.loaders.peft" in said
    for name in ("torch", "diffusers", "transformers", "peft"):
        assert f"{name} {importlib.metadata.version(name)}" in said
    assert "pip install -U diffusers transformers" in said


def test_a_diffusers_that_is_not_installed_or_has_no_such_class_is_told(diffusers_is: Any) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'diffusers'")

    for happens, said in ((missing, "No module named 'diffusers'"), (lambda: ModuleType("diffusers"), "FluxTrans")):
        diffusers_is(happens)
        with pytest.raises(UnsupportedError, match=f"diffusers cannot be imported: .*{said}"):
            library_of(FLUX)


def test_what_cannot_be_imported_ahead_is_left_to_the_load(diffusers_is: Any) -> None:
    diffusers_is(fail)
    libraries = Libraries(FLUX, CPU)
    libraries.wait()
    with pytest.raises(UnsupportedError):
        library_of(FLUX)


def test_the_import_runs_beside_its_caller_and_is_waited_for_once(diffusers_is: Any) -> None:
    release, imported = threading.Event(), threading.Event()

    def slow() -> Any:
        assert release.wait(60), "the constructor has waited"
        imported.set()
        return ModuleType("diffusers")

    diffusers_is(slow)
    libraries = Libraries(FLUX, CPU)
    assert not imported.is_set()
    threading.Timer(0.1, release.set).start()
    libraries.wait()
    assert imported.is_set()
    assert libraries.take_waited() > 0
    libraries.wait()
    assert libraries.take_waited() == 0


def test_without_a_recipe_nothing_is_imported_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library_of", lambda recipe: pytest.fail("imported"))
    libraries = Libraries(None, CPU)
    libraries.wait()
    assert libraries.take_waited() == 0


def test_comfyui_is_prepared_and_imported_for_its_models_and_diffusers_is_not(
    monkeypatch: pytest.MonkeyPatch, diffusers_is: Any
) -> None:
    """What is wrong with a user's diffusers does not matter to a model of ComfyUI's."""
    diffusers_is(fail)
    done: list[Any] = []
    monkeypatch.setattr(module, "prepare", lambda **options: done.append(options))
    network, before = ModuleType("parallel.comfyui.network"), importlib.import_module
    network.NetworkFile = object()

    def import_module(name: str, package: str | None = None) -> Any:
        if name != "..comfyui.network":
            return before(name, package)
        done.append(name)
        return network

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert library_of(COMFYUIS) is network.NetworkFile
    assert done == [{"root": "/ComfyUI"}, "..comfyui.network"]


def test_a_worker_that_loads_no_model_imports_no_library_and_not_torchs_compiler() -> None:
    found = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
