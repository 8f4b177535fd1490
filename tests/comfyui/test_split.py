"""ComfyUI's own networks under their split plans, in four gloo ranks, against the same networks alone."""

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
WRONG, HARDLY = 0.1, 0.01
"""What a plan without an exchange of keys is off by, at least; and where attention without norms hardly tells keys
apart."""
WITHOUT_NORMS = ("AuraFlow", "ERNIE-Image")

Results = dict[str, dict[str, Any]]


def results_of(installation: Installation, folder: Path, which: str) -> list[Results]:
    """Of each rank."""
    texts = run_ranks(
        "tests.comfyui.split_ranks",
        4,
        folder,
        [str(installation.path), which],
        timeout=1500,
        python=str(installation.python),
    )
    return [json.loads(text) for text in texts]


def assert_alike(ranks: list[Results], splits: set[str]) -> None:
    """Each case has been split, and gives what it gives alone."""
    for name in ranks[0]:
        told = {(split, rank): value for rank, found in enumerate(ranks) for split, value in found[name].items()}
        checked = {split: value for split, value in told.items() if split[0] not in ("without exchange", "renamed")}
        assert splits <= {split for split, _ in checked}, name
        for (split, rank), value in checked.items():
            exact = split in ("one rank", "removed")
            assert value == 0 if exact else value <= ALLOWED, f"{name}: {split}, rank {rank}: {value:.1e}"


@pytest.fixture(scope="module")
def plain(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of(installation, tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.timeout(900)
def test_one_network_of_each_class(plain: list[Results]) -> None:
    assert_alike(plain, {"one rank", "2 × 2", "removed"})
    assert {split for found in plain for told in found.values() for split in told} >= {
        "Ulysses 2", "ring 2", "2 × 2", "3 unequal",
    }  # fmt: skip


def test_blocks_that_a_node_skips(plain: list[Results]) -> None:
    """`assert_alike` has looked at the differences: here, that they were there. The others do not ask, but for
    Kandinsky 5, whose own way to run a block in a node's place fails."""
    asked = {name.partition(";")[0] for name, told in plain[0].items() if "all skipped" in told}
    assert len(asked) >= 18, asked


def test_these_cases_show_a_lost_exchange(plain: list[Results]) -> None:
    for name in plain[0]:
        if "without exchange" not in plain[0][name]:
            continue  # its attention is computed by every rank
        least = HARDLY if name.startswith(WITHOUT_NORMS) else WRONG
        assert max(found[name]["without exchange"] for found in plain[:2]) > least, name


def test_a_renamed_argument_is_named(plain: list[Results]) -> None:
    """As a newer ComfyUI might rename it. Each one that is cut, of each class."""
    assert assert_renamed_are_named(plain[3]) > 80


def assert_renamed_are_named(found: Results) -> int:
    """How many there are."""
    renamed = {name: told["renamed"] for name, told in found.items()}
    take_any_name = {name.partition(";")[0].partition(",")[0] for name, arguments in renamed.items() if not arguments}
    assert take_any_name <= {"AuraFlow", "Mochi", "SD3", "SD3.5 Medium"}
    for name, arguments in renamed.items():
        for path, message in arguments.items():
            argument = path.rpartition(".")[2]
            assert f"has no argument '{argument}', which its plan names" in message, f"{name}: {path}: {message}"
    return sum(map(len, renamed.values()))


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_every_variant_under_every_split(installation: Installation, tmp_path: Path) -> None:
    """`SPLIT_CASES`, a regular expression, chooses some of them by name."""
    chosen = os.environ.get("SPLIT_CASES", "")
    ranks = results_of(installation, tmp_path, chosen or "every")
    assert len(ranks[0]) >= (1 if chosen else 150)
    assert_alike(ranks, {"one rank", "Ulysses 2", "ring 2", "2 × 2", "3 unequal", "removed"})
    assert_renamed_are_named(ranks[3])
