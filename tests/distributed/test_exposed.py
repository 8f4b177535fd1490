"""Exposed communication: a rank counts the time in which it had to wait for others, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import Slow
from tests.distributed.exposed_ranks import LATE_S
from tests.distributed.start_ranks import run_ranks
from tests.distributed.tiny_models import Inputs, StartGroup, TinyModels, loaded, step

pytestmark = pytest.mark.slow

LONG = Inputs(frames=4, height=32, width=32)
TIMES = 6
"""How many times slower rank 1 is made."""


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """The figures of both ranks, by kind of attention."""
    folder = tmp_path_factory.mktemp("exposed")
    (folder / "memory").touch()
    return [json.loads(file) for file in run_ranks("tests.distributed.exposed_ranks", 2, folder, [folder / "memory"])]


@pytest.mark.parametrize("kind", ["ulysses", "common memory", "ring"])
def test_who_comes_first_waits_and_who_comes_late_does_not(waited: list[dict[str, dict[str, Any]]], kind: str):
    if kind not in waited[0]:
        pytest.skip("no common memory on this kind of machine")
    early, late = (rank[kind]["exposed_s"] for rank in waited)
    assert early >= 0.8 * LATE_S
    assert late <= 0.5 * early
    assert all(0 < rank[kind]["copying_s"] <= 0.5 * early for rank in waited)


def test_what_the_kernel_hides_does_not_count(waited: list[dict[str, dict[str, Any]]]):
    """The other rank's keys arrive late, but before this one has finished with its own."""
    assert all(rank["busy ring"]["exposed_s"] <= 0.5 * LATE_S for rank in waited), waited


@pytest.fixture
def model(start_group: StartGroup, tiny_models: TinyModels) -> Iterator[RemoteModel]:
    group = start_group("cpu,cpu")
    with loaded(group, tiny_models.path()) as remote:
        yield remote
        group.call(Slow(times=[1, 1]))


def steps(model: RemoteModel) -> list[list[dict[str, Any]]]:
    """What both ranks say of five steps, the one first that other processes have disturbed least."""
    made = []
    for _ in range(5):
        step(model, LONG)
        made.append(model.last_step)
    return sorted(made, key=lambda ranks: max(rank["seconds"] for rank in ranks))


@pytest.mark.cpu_ranks("ranks that share a GPU slow each other down")
def test_a_slow_rank_makes_the_other_one_wait(model: RemoteModel):
    before = min(ranks[0]["exposed_s"] for ranks in steps(model))
    group = model.weights.group
    assert group is not None
    group.call(Slow(times=[1, TIMES]))
    quick, slow = steps(model)[0]
    computed = slow["seconds"] - slow["exposed_s"]
    expected = computed * (1 - 1 / TIMES)  # both end together, and the quick one has computed as much in less time
    assert 0.4 * expected <= quick["exposed_s"] <= 1.5 * expected, "processes that sleep are timed more closely, above"
    assert quick["exposed_s"] > 2 * before
    assert slow["exposed_s"] < 0.25 * quick["exposed_s"]
    shown = group.status()
    assert shown["step"]["exposed_s"] == max(rank["exposed_s"] for rank in shown["ranks"]) > 0


def test_one_rank_never_waits(start_group: StartGroup, tiny_models: TinyModels):
    with loaded(start_group("cpu"), tiny_models.path()) as alone:
        step(alone, Inputs())
        assert [(rank["exposed_s"], rank["copying_s"]) for rank in alone.last_step] == [(0.0, 0.0)]


def test_ranks_that_share_no_sequence_do_not_wait_in_a_step(start_group: StartGroup, tiny_models: TinyModels):
    with loaded(start_group("cpu,cpu"), tiny_models.path(), dp_degree=2) as apart:
        step(apart, Inputs(batch=2))
        assert [rank["exposed_s"] for rank in apart.last_step] == [0.0, 0.0]
