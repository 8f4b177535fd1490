"""The engine against what a real ComfyUI computed (see tests/golden/make_golden.py). No ComfyUI is needed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from parallel.host.remote_model import RemoteModel
from tests.distributed.devices import kind
from tests.distributed.tiny_models import StartGroup, TinyModels, recipe_of, relative_difference
from tests.golden import vectors

TOLERANCE = kind().reference
NAMES = vectors.names()
FORWARDS = [name for name in NAMES if name != "trajectory"]
LATENT_SCALE = 0.476986
"""Of HunyuanVideo's latents in ComfyUI."""

Load = Callable[[str], RemoteModel]


@pytest.fixture
def checkpoint(tiny_models: TinyModels) -> Callable[[str], Path]:
    """The checkpoint that ComfyUI had, made again from its recipe."""

    def make(name: str) -> Path:
        golden = vectors.read(name)
        path = tiny_models.path(**golden.checkpoint)
        assert vectors.digest(path) == golden.digest, (
            "the random weights are not those that ComfyUI had: the generator of tiny checkpoints has changed,"
            " this test says nothing of the engine (run tests/golden/make_golden.py again if that was intended)"
        )
        return path

    return make


@pytest.fixture(params=["cpu", "cpu,cpu"])
def load(request: pytest.FixtureRequest, start_group: StartGroup, checkpoint: Callable[[str], Path]) -> Iterator[Load]:
    """Loads a case's model on one worker or two."""
    models: list[RemoteModel] = []

    def load(name: str) -> RemoteModel:
        models.append(RemoteModel(recipe_of(checkpoint(name), request.param), group=start_group(request.param)))
        models[-1].ensure_loaded()
        return models[-1]

    yield load
    for model in models:
        model.unload()


@pytest.mark.parametrize("name", FORWARDS)
def test_one_step_equals_comfyuis(load: Load, name: str):
    golden = vectors.read(name)
    prediction = load(name).step(golden.tensors["x"], golden.tensors["timestep"], golden.conditioning)
    assert relative_difference(prediction, golden.tensors["expected"]) <= TOLERANCE


def test_a_whole_sampling_equals_comfyuis(load: Load):
    """KSampler with euler and simple: its latent from its noise, by its sigmas."""
    golden = vectors.read("trajectory")
    model = load("trajectory")
    x = golden.tensors["noise"]
    for sigma, following in pairwise(golden.tensors["sigmas"]):
        velocity = model.step(x, 1000 * sigma[None], golden.conditioning)
        x = x + (following - sigma) * velocity
    assert relative_difference(x / LATENT_SCALE, golden.tensors["expected"]) <= TOLERANCE


def test_the_cases_are_there_and_small():
    assert len(FORWARDS) >= 6
    assert "trajectory" in NAMES
    assert sum(path.stat().st_size for path in vectors.FOLDER.glob("*.safetensors")) < 1_100_000


def test_the_digest_notices_other_weights(tiny_models: TinyModels):
    golden = vectors.read("padded_text")
    other = tiny_models.path(**(golden.checkpoint | {"seed": golden.checkpoint["seed"] + 100}))
    assert vectors.digest(other) != golden.digest
