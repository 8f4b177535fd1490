"""Loads a tiny model of each of diffusers' planned classes on two CPU workers; a step is compared with the class's own.

Run by the Python of the environment under test, which has no pytest: `python -m tests.crowded.every_network`, from the
root. Prints one line of JSON per class: `network`, and `error`, None or the message.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from parallel.config import SequenceParallelConfig, resolve
from parallel.diffusers.folder import NetworkFile, recipe
from parallel.diffusers.tiny import TINY, tiny_request, write_tiny
from parallel.errors import EngineError
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.sampling.step_request import StepRequest
from parallel.wire.trees import restore

CONFIG = SequenceParallelConfig(devices="cpu,cpu")
ALLOWED = 1e-4
"""Largest difference, relative to the largest value."""


def step(group: WorkerGroup, path: Path, request: StepRequest) -> Tensor:
    """The prediction of the workers."""
    model = RemoteModel(recipe(str(path), CONFIG), group=group)
    model.weights.ensure_loaded()
    try:
        return model.steps([request])[0]
    finally:
        model.weights.unload()


@torch.no_grad()
def alone(path: Path, request: StepRequest) -> Tensor:
    """The prediction of diffusers' class in this process."""
    network, _ = NetworkFile(str(path), None, torch.device("cpu")).network()
    tensors = {"x": request.x, "timestep": request.timestep, **request.conditioning}
    arguments = restore(request.arguments, tensors.__getitem__)
    prediction: Tensor = network(*arguments["args"], **arguments["named"])[0]
    return prediction


def tried(group: WorkerGroup, network: str, path: Path) -> str | None:
    """What is wrong with a class; None where nothing is."""
    try:
        write_tiny(path, network)
        request = tiny_request(network)
        found, expected = step(group, path, request), alone(path, request)
    except EngineError as error:
        return str(error)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return None if difference <= ALLOWED else f"differs by {difference:.2g} from the class's own step"


def main() -> int:
    """Returns the number of classes that failed."""
    failed = 0
    group = WorkerGroup(resolve(CONFIG), threads=1)
    group.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for network in TINY:
                error = tried(group, network, Path(folder) / network)
                failed += error is not None
                print(json.dumps({"network": network, "error": error}), flush=True)
                if not group.alive:
                    break
    finally:
        group.stop()
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
