"""Loads a tiny checkpoint of every family on two CPU workers and takes one step, which includes the self-check.

Run by the Python of the environment under test, which has no pytest: `python -m tests.crowded.every_family`, from the
root. Prints one line of JSON per family: `family`, and `error`, None or the message.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from parallel.adapters.registry import FAMILIES
from parallel.config import SequenceParallelConfig, resolve
from parallel.demo.checkpoint import WRITERS
from parallel.errors import EngineError
from parallel.host.group import WorkerGroup
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel

CONFIG = SequenceParallelConfig(devices="cpu,cpu")


def step(group: WorkerGroup, path: Path) -> None:
    """Loads the checkpoint and takes one step.

    Raises:
        EngineError: it could not be loaded, the split step differs from a single-rank step, or it is not finite.
    """
    recipe = Recipe(path=str(path), weight_dtype=torch.float32, compute_dtype=torch.float32, config=CONFIG)
    model = RemoteModel(recipe, group=group)
    model.ensure_loaded()
    try:
        inputs = model.inspected.adapter.example(model.inspected.model_config, 2, torch.float32)
        prediction = model.step(inputs.pop("x"), inputs.pop("timestep"), inputs)
        if not prediction.isfinite().all():
            raise EngineError("the prediction is not finite")
    finally:
        model.unload()


def main() -> int:
    """Returns the number of families that failed."""
    failed = 0
    group = WorkerGroup(resolve(CONFIG), threads=1)
    group.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for family in FAMILIES:
                path = Path(folder) / f"{family}.safetensors"
                WRITERS[family](path, heads=2, depth=2)
                error = None
                try:
                    step(group, path)
                except EngineError as failure:
                    error, failed = str(failure), failed + 1
                print(json.dumps({"family": family, "error": error}), flush=True)
                if not group.alive:
                    break
    finally:
        group.stop()
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
