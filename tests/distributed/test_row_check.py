"""Attention's check at its real length, on 1 to 4 real processes: right attentions pass, wrong ones are refused."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.distributed.row_check_ranks import CASES, WORLDS, Case, Result
from tests.distributed.start_ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Every case's results, by rank; the processes of each world are started once."""
    by_case: dict[str, list[Result]] = defaultdict(list)
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"world{world}")
        for file in run_ranks("tests.distributed.row_check_ranks", world, folder, [str(folder / "memory")]):
            for entry in json.loads(file):
                by_case[entry["case"]].append(Result(**entry))
    return by_case


def of(results: dict[str, list[Result]], case: Case) -> list[Result]:
    ranks = results[case.name]
    assert [result.rank for result in ranks] == list(range(len(case.weights)))
    return ranks


@pytest.mark.parametrize("case", [c for c in CASES if not c.fault], ids=lambda case: case.name.replace(" ", "-"))
def test_a_right_attention_passes_once_and_far_from_the_limit(results: dict[str, list[Result]], case: Case):
    axes = sum(degree > 1 for degree in (case.ring, len(case.weights) // case.ring))
    for result in of(results, case):
        assert result.message == ""
        assert result.error <= result.allowed / 3
        assert result.passed == 1
        assert result.collectives == [4 * axes, 0], "the second attention of a kind is not checked again"


@pytest.mark.parametrize("case", [c for c in CASES if c.fault], ids=lambda case: case.name.replace(" ", "-"))
def test_a_wrong_attention_is_refused_on_all_ranks_alike(results: dict[str, list[Result]], case: Case):
    ranks = of(results, case)
    assert {result.passed for result in ranks} == {0}
    (message,) = {result.message for result in ranks}
    ulysses = len(case.weights) // case.ring
    for part in (
        f"attention 'sdpa' failed its check at {case.tokens[0] if case.between else sum(case.tokens)} tokens",
        f"{case.heads} heads of 64 channels in {case.dtype}",
        f"ulysses {ulysses} × ring {case.ring}",
        "differ by",
        f"allowed {ranks[0].allowed:.2g}",
    ):
        assert part in message
    assert ("ulysses_degree 1" in message) == (ulysses > 1)
    assert ("ring_degree 1" in message) == (case.ring > 1)
