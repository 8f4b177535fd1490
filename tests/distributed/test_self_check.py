"""The self-check's tolerance: what rounding makes of a network passes, a systematic error of one percent does not."""

from __future__ import annotations

import json
from collections import defaultdict
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from parallel.demo.checkpoint import WRITERS
from tests.distributed.self_check_ranks import FAULTS, Result
from tests.distributed.start_ranks import run_ranks

WORLD = 3
OPTIONS: dict[str, dict[str, Any]] = {"wan": {"context_dim": 64}}
DEPTHS = [2, pytest.param(24, marks=[pytest.mark.extended, pytest.mark.slow])]
HALF_AN_ULP_OF_BF16 = 2.0**-8

Found = dict[tuple[str, str, str], list[Result]]
"""Family, dtype and fault → results by rank."""


@pytest.fixture(scope="module", params=DEPTHS, ids=lambda depth: f"{depth} blocks")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("models")
    checkpoints = [write(folder, family, request.param) for family in WRITERS]
    results: Found = defaultdict(list)
    for file in run_ranks("tests.distributed.self_check_ranks", WORLD, folder, checkpoints, timeout=280):
        for entry in json.loads(file):
            result = Result(**entry)
            results[result.family, result.dtype, result.fault].append(result)
    return results


def write(folder: Path, family: str, depth: int) -> str:
    """A checkpoint with so many blocks of each kind."""
    known = signature(WRITERS[family]).parameters
    depths = {name: depth for name in ("depth", "depth_single") if name in known}
    WRITERS[family](folder / f"{family}.safetensors", **OPTIONS.get(family, {}), **depths)
    return str(folder / f"{family}.safetensors")


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_passes(found: Found, family: str, dtype: str):
    ranks = found[family, dtype, ""]
    assert len(ranks) == WORLD
    for result in ranks:
        assert result.message == ""
        assert result.norm <= 0.5 and result.slope <= 0.5, "too near to the limits"
        assert (result.noise is None) == (dtype == "float32")
        if result.noise is not None:
            assert result.noise >= HALF_AN_ULP_OF_BF16 / 3, "the reference's own noise has not been measured"
            assert result.norm > 0, "this split rounds as the reference does, so nothing was tested"


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault])
def test_a_systematic_error_fails_on_all_ranks_alike(found: Found, family: str, dtype: str, fault: str):
    ranks = found[family, dtype, fault]
    assert len(ranks) == WORLD
    if fault == "1 % too large" and (noise := ranks[0].noise) is not None and noise > 0.015:
        pytest.skip("more noise than the error")
    (message,) = {result.message for result in ranks}
    assert f"{family} failed its self-check: split as ulysses 1 × ring 3" in message
    assert "the prediction differs by" in message and "allowed" in message
