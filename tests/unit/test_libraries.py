"""What a worker imports, when, and what it says where that fails."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.adapters.hunyuan_video import HunyuanVideoAdapter
from parallel.adapters.registry import FAMILIES
from parallel.errors import UnsupportedError
from parallel.worker.libraries import Libraries, model_class

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STARTED = """
import sys
import parallel.worker.loop
from parallel import numerics
numerics.apply(numerics.read())
print([name for name in ("diffusers", "transformers", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers' model cannot be imported."""

    def fail(_: HunyuanVideoAdapter) -> type:
        raise RuntimeError("Failed to import diffusers.loaders.peft")

    monkeypatch.setattr(HunyuanVideoAdapter, "model_class", fail)
    yield


def test_what_cannot_be_imported_is_told_with_the_versions(broken: None) -> None:
    with pytest.raises(UnsupportedError) as caught:
        model_class(HunyuanVideoAdapter())
    said = str(caught.value)
    assert "RuntimeError: Failed to import diffusers.loaders.peft" in said
    for name in ("torch", "diffusers", "transformers", "peft"):
        assert f"{name} {importlib.metadata.version(name)}" in said
    assert "requirements.txt" in said


def test_what_cannot_be_imported_ahead_is_left_to_the_load(broken: None) -> None:
    libraries = Libraries("hunyuan_video", CPU)
    libraries.wait()
    with pytest.raises(UnsupportedError):
        model_class(HunyuanVideoAdapter())


def test_the_import_runs_beside_its_caller_and_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    release, imported = threading.Event(), threading.Event()

    def slow(_: HunyuanVideoAdapter) -> type:
        assert release.wait(60), "the constructor has waited"
        imported.set()
        return torch.nn.Module

    monkeypatch.setattr(HunyuanVideoAdapter, "model_class", slow)
    libraries = Libraries("hunyuan_video", CPU)
    assert not imported.is_set()
    threading.Timer(0.1, release.set).start()
    libraries.wait()
    assert imported.is_set()
    assert libraries.take_waited() > 0
    libraries.wait()
    assert libraries.take_waited() == 0


def test_without_a_family_nothing_is_imported_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES.values():
        monkeypatch.setattr(family, "model_class", lambda _: pytest.fail("imported"))
    libraries = Libraries(None, CPU)
    libraries.wait()
    assert libraries.take_waited() == 0


def test_a_worker_that_loads_no_model_imports_neither_diffusers_nor_torchs_compiler() -> None:
    found = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
