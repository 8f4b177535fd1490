"""Tokens that see nothing of the others stay whole on every rank, and the others see them."""

import json
from pathlib import Path

import pytest

from tests.distributed.start_ranks import run_ranks
from tests.distributed.whole_prefix_ranks import CASES


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 3, 4))
def test_a_whole_prefix_is_seen_by_all_and_computed_by_each(world: int, tmp_path: Path) -> None:
    answers = [json.loads(answer) for answer in run_ranks("tests.distributed.whole_prefix_ranks", world, tmp_path)]
    assert len(answers) == world and len(answers[0]) >= len(CASES)
    assert all(difference < 1e-5 for answer in answers for difference in answer.values()), answers
