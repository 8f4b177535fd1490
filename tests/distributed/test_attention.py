"""Ulysses attention on 1 to 4 real processes against attention on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.distributed.attention_ranks import CASES, HEAD_DIM, PROCESSES, Case, Result

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
FP32 = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Every case's results, by rank. The processes are started once."""
    folder = tmp_path_factory.mktemp("attention")
    files = [folder / f"{rank}.json" for rank in range(PROCESSES)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.attention_ranks", str(rank), str(folder / "store"), str(file)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    for number, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {number} ended with {process.returncode}:\n{output}"
    by_case: dict[str, list[Result]] = defaultdict(list)
    for file in files:
        for entry in json.loads(file.read_text()):
            by_case[entry["case"]].append(Result(**entry))
    return by_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_rank_gets_its_tokens_of_the_whole_attention(results: dict[str, list[Result]], case: Case):
    ranks = results[case.name]
    assert [result.rank for result in ranks] == list(range(case.world))
    for result in ranks:
        assert tuple(result.shape) == (case.batch, case.plan.tokens[result.rank], case.heads, HEAD_DIM)
        assert result.error <= TOLERANCE
        assert result.collectives == ["all_to_all_single"] * 2
        assert result.bytes_to_others == case.plan.exchange_bytes(result.rank, case.batch, HEAD_DIM, FP32)


def test_the_cases_include_the_hard_ones():
    """Ranks without a text token, with nothing but text, without a head; a leader that is not rank 0."""
    plans = [case.plan for case in CASES]
    streams = [plan.stream_ranges(rank) for plan in plans for rank in range(plan.world_size)]
    counts = [(video[1] - video[0], text[1] - text[0]) for video, text in streams]
    assert any(video and not text for video, text in counts)
    assert any(text and not video for video, text in counts)
    assert any(video and text for video, text in counts)
    assert any(0 in plan.local_heads for plan in plans)
    assert any(len(set(plan.tokens)) > 1 for plan in plans)
    assert any(plan.leader > 0 for plan in plans)
