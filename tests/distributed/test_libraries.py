"""Packages that diffusers imports where they are installed are nobody's to hide: tests/requirements.txt has peft. No
garbage is looked for among what they define."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from parallel.config import SequenceParallelConfig, resolve
from parallel.host import process
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.wire import messages
from tests.distributed.tiny_models import TinyModels, recipe_of


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False], ids=["imported_while_meeting", "imported_by_the_load"])
def test_a_worker_with_a_model_has_transformers_and_peft_as_they_are(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(process, "_BOOT", Path(__file__).with_name("reporting_boot.py"))
    recipe = recipe_of(tiny_models.path(), "cpu")
    layout = resolve(SequenceParallelConfig(devices="cpu"))
    group = WorkerGroup(layout, threads=1, first=recipe.to_json() if ahead else None)
    group.start()
    try:
        model = RemoteModel(recipe, group=group)
        model.weights.ensure_loaded()
        (facts,) = group.call(messages.ForgetCache(model=model.name, sampling=0))
    finally:
        group.stop()
    assert facts["hidden"] == []
    assert facts["transformers"] == importlib.metadata.version("transformers")
    assert facts["pretrained"]
    assert facts["lora"], "diffusers cannot use peft"
    assert facts["collects"] and facts["frozen"] > 100_000, "a collection goes through all that is imported"
