"""Every plan there can be, on real processes: each rank's slice is what one device computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel.attention.common_memory import CommonMemory
from tests.distributed.devices import chosen, kind, most_ranks, rank_environment
from tests.distributed.property_ranks import Case, ModelCase, Plan
from tests.distributed.start_ranks import ROOT
from tests.distributed.tiny_models import FLUX, HUNYUAN, NETWORKS, TinyModels

FP32_TOLERANCE = kind().split


class World:
    """Processes that have met and answer one case after the other."""

    def __init__(self, size: int, folders: dict[str, Path]):
        arguments = [f"{network}={path}" for network, path in folders.items()]
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.property_ranks", str(rank), str(size), store, *arguments],
                cwd=ROOT,
                env=os.environ | rank_environment(rank),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def run(self, case: Case | ModelCase) -> list[Any]:
        """Each rank's answer."""
        line = json.dumps(asdict(case)) + "\n"
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self._ranks):
            assert process.stdout is not None
            answer = process.stdout.readline()
            assert answer, f"rank {rank} ended"
            answers.append(json.loads(answer))
        return answers

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._ranks)

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.communicate()
        self._folder.cleanup()


class Worlds:
    """A world of each size, started when first asked for, and again after a case that broke it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self._worlds: dict[int, World] = {}

    def run(self, case: Case | ModelCase) -> list[Any]:
        size = case.plan.degrees.world_size
        if size in self._worlds and not self._worlds[size].alive:
            self._worlds.pop(size).end()
        if size not in self._worlds:
            self._worlds[size] = World(size, self._folders)
        try:
            return self._worlds[size].run(case)
        except BaseException:
            self._worlds.pop(size).end()
            raise

    def end(self) -> None:
        for world in self._worlds.values():
            world.end()


@pytest.fixture(scope="module")
def worlds(tiny_models: TinyModels) -> Iterator[Worlds]:
    worlds = Worlds({network: tiny_models.path(network, heads=3) for network in NETWORKS})
    yield worlds
    worlds.end()


DEGREES = [
    (dp, cfg, ring, ulysses)
    for dp in range(1, 5)
    for cfg in (1, 2)
    for ring in range(1, 5)
    for ulysses in range(1, 5)
    if dp * cfg * ring * ulysses <= most_ranks(4)
]
PRIMES = (2, 3, 5, 7, 11, 13, 101, 127, 499, 997, 1009, 1499, 1999)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    dp, cfg, ring, ulysses = draw(st.sampled_from(DEGREES))
    weight = st.one_of(st.just(1.0), st.sampled_from([1.5, 2.0, 3.0, 4.0]), st.floats(1, 4))
    return Plan(
        dp=dp,
        cfg=cfg,
        ring=ring,
        ulysses=ulysses,
        weights=tuple(draw(weight) for _ in range(dp * cfg * ring * ulysses)),
        common=draw(st.booleans()) and chosen() == "cpu" and CommonMemory.supported(),
    )


@st.composite
def cases(draw: st.DrawFn, dtype: str = "float32") -> Case:
    plan = draw(plans())
    sp = plan.degrees.sp
    padded = draw(st.integers(1, 64))
    video = draw(
        st.one_of(st.integers(sp, sp + 8), st.sampled_from([p for p in PRIMES if p >= sp]), st.integers(sp, 2000))
    )
    return Case(
        plan=plan,
        heads=draw(st.integers(1, 12)),
        video=video,
        padded=padded,
        valid=tuple(draw(st.lists(st.integers(0, padded), min_size=1, max_size=3))),
        pipeline=draw(st.integers(1, 3)),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def model_cases(draw: st.DrawFn) -> ModelCase:
    network = draw(st.sampled_from(NETWORKS))
    # The host takes nothing apart of which it cannot tell whether it has samples: as many positions of FLUX's text.
    text = draw(st.integers(1, 24))
    batch = draw(st.integers(1, 3).filter(lambda batch: batch == 1 or network != FLUX or batch != text))
    inputs = {
        "network": network,
        "frames": draw(st.integers(1, 3)),
        "height": 2 * draw(st.integers(2, 5)),
        "width": 2 * draw(st.integers(2, 5)),
        "text": text,
        "valid": [draw(st.integers(1, text)) for _ in range(batch)] if network == HUNYUAN else None,
        "batch": batch,
        "seed": draw(st.integers(0, 2**16)),
    }
    return ModelCase(plan=draw(plans()), inputs=inputs)


def check(worlds: Worlds, case: Case) -> None:
    answers = worlds.run(case)
    sp = case.plan.degrees.sp
    for first in range(0, len(answers), sp):  # the ranks of a group work on the same samples
        assert len({tuple(s["sample"] for s in samples) for samples in answers[first : first + sp]}) == 1
    done = [sample["sample"] for samples in answers[::sp] for sample in samples]
    assert sorted(done) == list(range(len(case.valid))), "each sample is one group's work"
    for samples in answers:
        for sample in samples:
            allowed = FP32_TOLERANCE
            if case.dtype == "bfloat16":
                allowed = 3 * sample["single_error"] + sample["ulp"]
            assert sample["error"] <= allowed
            assert sample["counted"] == sample["predicted"]


def example_count(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)


def check_model(worlds: Worlds, case: ModelCase) -> None:
    assert max(worlds.run(case)) <= FP32_TOLERANCE


@pytest.mark.slow
@example_count(200)
@given(case=cases())
def test_any_plan_in_fp32(worlds: Worlds, case: Case):
    check(worlds, case)


@pytest.mark.slow
@example_count(100)
@given(case=cases("bfloat16"))
def test_any_plan_in_bf16(worlds: Worlds, case: Case):
    check(worlds, case)


@pytest.mark.slow
@example_count(60)
@given(case=model_cases())
def test_a_whole_model_under_any_plan(worlds: Worlds, case: ModelCase):
    check_model(worlds, case)


@pytest.mark.thousands
@pytest.mark.timeout(3600)
@example_count(1000)
@given(case=model_cases())
def test_a_whole_model_under_a_thousand_plans(worlds: Worlds, case: ModelCase):
    check_model(worlds, case)


@pytest.mark.thousands
@pytest.mark.timeout(3600)
@example_count(3000)
@given(case=cases())
def test_thousands_of_plans_in_fp32(worlds: Worlds, case: Case):
    check(worlds, case)


@pytest.mark.thousands
@pytest.mark.timeout(3600)
@example_count(1000)
@given(case=cases("bfloat16"))
def test_thousands_of_plans_in_bf16(worlds: Worlds, case: Case):
    check(worlds, case)
