"""A whole model differentiated on several ranks: the gradients of one, and a share of its activations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.devices import chosen, kind
from tests.distributed.gradient_ranks import CASES, DIFFERENTIATED, Case
from tests.distributed.start_ranks import run_ranks
from tests.distributed.tiny_models import TinyModels

TOLERANCE = kind().split


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.extended)], ids="world_{}".format)
def answers(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Each rank's answer."""
    path = tiny_models.path(heads=4)
    folder = tmp_path_factory.mktemp("gradients")
    return [
        json.loads(text)
        for text in run_ranks("tests.distributed.gradient_ranks", request.param, folder, [str(path)], timeout=240)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_averaged_over_ranks_are_those_of_one(answers: list[dict[str, Any]], case: Case):
    if case.ring > 1 and chosen() != "cpu":
        pytest.skip("a ring on CUDA has no gradients")
    for answer in answers:
        (result,) = (result for result in answer["gradients"] if result["case"] == case.name)
        errors = result["errors"]
        assert set(DIFFERENTIATED) < set(errors) and len(errors) > 50
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= TOLERANCE, worst


@pytest.mark.slow
def test_a_forward_pass_keeps_a_share_of_the_activations(answers: list[dict[str, Any]]):
    world = len(answers)
    for split, alone in (answer["peaks"] for answer in answers):
        print(f"peak activation memory of one of {world} ranks: {split / alone:.3f} of one alone's")
        assert split <= {2: 0.55, 4: 0.30}[world] * alone
