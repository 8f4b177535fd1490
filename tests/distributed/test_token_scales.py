"""Layers that divide their input by the largest value of all tokens do so on ranks that have some of them."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.start_ranks import run_ranks
from tests.distributed.token_scale_ranks import tokens


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 3, 4))
def test_every_rank_has_the_scale_of_all_tokens(world: int, tmp_path: Path) -> None:
    answers = [json.loads(answer) for answer in run_ranks("tests.distributed.token_scale_ranks", world, tmp_path)]
    expected = (tokens(world).abs().amax() / (448 * 6)).item()
    assert expected == pytest.approx(17 / 2688)
    for answer in answers:
        assert answer.pop("alone") is None, "one rank leaves the scale to the layer"
        for ring, scales in answer.items():
            assert scales == [expected] * 2, f"ring {ring}"


def test_the_divisor_is_that_of_the_format() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == 448
