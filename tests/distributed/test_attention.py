"""Ulysses, ring and hybrid attention on 1 to 4 real processes against attention on one device."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.distributed.attention_ranks import CASES, HEAD_DIM, PROCESSES, Case, Result
from tests.distributed.devices import chosen, kind
from tests.distributed.start_ranks import run_ranks

TOLERANCE = kind().split
FP32 = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Every case's results, by rank. The processes are started once."""
    folder = tmp_path_factory.mktemp("attention")
    files = run_ranks("tests.distributed.attention_ranks", PROCESSES, folder)
    by_case: dict[str, list[Result]] = defaultdict(list)
    for file in files:
        for entry in json.loads(file):
            by_case[entry["case"]].append(Result(**entry))
    return by_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_rank_gets_its_tokens_of_the_whole_attention(results: dict[str, list[Result]], case: Case):
    ranks = results[case.name]
    assert [result.rank for result in ranks] == list(range(case.world))
    for result in ranks:
        assert tuple(result.shape) == (case.batch, case.plan.tokens[result.rank], case.heads, HEAD_DIM)
        assert result.error <= TOLERANCE
        assert (result.gradient_error is None) == (case.ring > 1 and chosen() != "cpu")
        assert result.gradient_error is None or result.gradient_error <= TOLERANCE
        assert result.collectives == expected_collectives(case, result.rank)
        assert result.bytes_to_others == case.plan.exchange_bytes(result.rank, case.batch, HEAD_DIM, FP32)
        assert result.least >= 1, "a rank that neither sends nor receives in a collective"
        assert tuple(result.reported) == (len(result.collectives), result.bytes_to_others)


def expected_collectives(case: Case, rank: int) -> list[str]:
    """Two all-to-alls for each chunk of heads, and a ring exchange for each hop in between."""
    plan = case.plan
    hops = ["batch_isend_irecv"] * (case.ring - 1) if plan.local_heads[rank] else []
    if case.world == case.ring:
        return hops
    chunks = max(1, min(case.pipeline, *plan.local_heads[plan.row(rank)]))
    here, coming, back = hops, ["all_to_all_single"], ["all_to_all_single"]
    # chunk i + 1 is sent for before the attention of chunk i
    return coming + (coming + here + back) * (chunks - 1) + here + back


def test_the_cases_include_the_hard_ones():
    """Ranks without a head, also the first one; uneven tokens and rows; several heads in every chunk."""
    plans = [case.plan for case in CASES]
    assert any(0 in plan.local_heads for plan in plans)
    assert any(len(set(plan.tokens)) > 1 for plan in plans)
    assert any(plan.local_heads[0] == 0 for plan in plans)
    assert any(plan.ring_degree > 1 and len(set(plan.chunks)) > 1 for plan in plans)
    assert any(min(plan.local_heads) > 1 for plan, case in zip(plans, CASES, strict=True) if case.pipeline > 1)
