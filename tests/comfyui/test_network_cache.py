"""Caches between the blocks of ComfyUI's own networks under split plans, in gloo ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import Installation
from tests.distributed.start_ranks import run_ranks

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

ALLOWED = 1e-5
"""Relative, in fp32. Sums of other orders differ by about 1e-6."""
SHOWN = 1e-3
"""What skipping changes, and what is added for skipped blocks changes, at least."""

Results = dict[str, dict[str, Any]]


def results_of(installation: Installation, folder: Path, which: str) -> list[Results]:
    """Of both ranks."""
    arguments = [str(installation.path), which]
    python = str(installation.python)
    texts = run_ranks("tests.comfyui.cached_ranks", 2, folder, arguments, timeout=1500, python=python)
    return [json.loads(text) for text in texts]


def assert_right(ranks: list[Results], splits: set[str]) -> None:
    cases = [name for name in ranks[0] if not name.endswith("unequal change")]
    assert cases
    for rank, found in enumerate(ranks):
        for name in cases:
            assert set(found[name]) == splits, name
            for split, facts in found[name].items():
                case = f"{name}, {split}, rank {rank}: {facts}"
                assert facts["zero"], f"a threshold of 0 changes the result: {case}"
                assert facts["hits"] == [0, 1, 1], case
                computed = 0 if name.endswith("teacache") else 1
                assert facts["blocks"][0] > 1 and facts["blocks"][1:] == [computed] * 2, case
                assert facts["skipped"] <= ALLOWED, case
                assert facts["shown"] > SHOWN, f"a case that would not show a wrong residual: {case}"
                assert not facts["left"] and facts["after"], f"the cache has left something behind: {case}"


@pytest.fixture(scope="module")
def plain(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of(installation, tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.timeout(600)
def test_skipped_blocks_are_replaced_by_what_they_have_added(plain: list[Results]) -> None:
    assert_right(plain, {"Ulysses"})


def test_ranks_on_both_sides_of_the_threshold_decide_alike(plain: list[Results]) -> None:
    """Each rank alone would decide by its own tokens; they would then wait for each other forever."""
    names = [name for name in plain[0] if name.endswith("unequal change")]
    assert names
    for name in names:
        assert [found[name]["apart"] for found in plain] == [[1], [1]], "not the case that this test is about"
        assert [found[name]["hits"] for found in plain] == [[0, 1], [0, 1]], name


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_every_variant(installation: Installation, tmp_path: Path) -> None:
    """`SPLIT_CASES`, a regular expression, chooses some of them by name."""
    chosen = os.environ.get("SPLIT_CASES", "")
    ranks = results_of(installation, tmp_path, chosen or "every")
    assert len(ranks[0]) >= (1 if chosen else 35)
    assert_right(ranks, {"one rank", "Ulysses", "ring", "phantoms"})
