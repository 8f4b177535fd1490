"""Compiled blocks in the workers: the same results, compiled once, kept for the next start; a fall-back that is told.

Compiling takes seconds even for the tiniest model, so the tests share one folder of compiled code, and go from cold to
warm in their order.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.cache.settings import FirstBlockCacheSettings
from parallel.checkpoints.source import Stored
from parallel.compilation.folder import VARIABLE
from parallel.compilation.settings import CompileSettings
from parallel.config import SequenceParallelConfig, resolve
from parallel.host import group as group_module
from parallel.host.cached_sampling import CachedSampling
from parallel.host.compiled_sampling import CompiledSampling
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.host.step_request import StepRequest
from tests.distributed.devices import kind, on_ranks
from tests.distributed.process_facts import all_ended
from tests.distributed.tiny_models import TinyModels, WanInputs, loaded, relative_difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)"),
]

TOLERANCE = kind().split
WAN: dict[str, Any] = {"family": "wan", "context_dim": 64, "depth": 2}
SIZES = [WanInputs(), WanInputs(frames=3, height=9, width=7), WanInputs(frames=5, height=6, width=4, text=5)]


def request_of(inputs: WanInputs) -> StepRequest:
    return StepRequest(*inputs.make())


@dataclass
class Start:
    """A start of the workers with an environment of its own."""

    devices: str
    environment: dict[str, str]
    groups: list[WorkerGroup] = field(default_factory=list)

    def __enter__(self) -> WorkerGroup:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            group = WorkerGroup(resolve(SequenceParallelConfig(devices=on_ranks(self.devices))), threads=1)
            group.start()
        self.groups.append(group)
        return group

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            pids = group.pids
            group.stop()
            assert all_ended(pids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def path(tiny_models: TinyModels) -> Path:
    return tiny_models.path(**WAN)


@dataclass
class First:
    """The first start, with an empty folder."""

    remote: RemoteModel
    cold: CompiledSampling


@pytest.fixture(scope="module")
def first(folder: Path, path: Path) -> Iterator[First]:
    with Start("cpu,cpu", {VARIABLE: str(folder)}) as group, loaded(group, path) as remote:
        cold = CompiledSampling(CompileSettings())
        remote.steps([request_of(SIZES[0])], compiled=cold)
        yield First(remote, cold)


def both(remote: RemoteModel, inputs: WanInputs) -> tuple[float, CompiledSampling]:
    """How far a compiled step is from one that is not, and what was compiled for it."""
    request, compiled = request_of(inputs), CompiledSampling(CompileSettings())
    (expected,) = remote.steps([request])
    (actual,) = remote.steps([request], compiled=compiled)
    assert all(0 < rank["exposed_s"] < rank["seconds"] for rank in remote.last_step), "waits inside graphs count, too"
    return relative_difference(actual, expected), compiled


def test_each_kind_of_block_is_one_graph_without_a_break(first: First):
    report = first.cold.report
    assert (report.kinds, report.graphs, report.breaks, report.recompilations) == (1, 1, 0, 0)
    assert report.failures == ()
    assert "1 kind of blocks, 1 graph compiled in" in str(report) and "0 graph breaks" in str(report)


@pytest.mark.parametrize("inputs", SIZES, ids=str)
def test_other_sizes_and_prompts_need_no_compilation_and_agree(first: First, inputs: WanInputs):
    difference, compiled = both(first.remote, inputs)
    assert 0 < difference <= TOLERANCE, "0: nothing was compiled"
    assert compiled.report.graphs == 0 and compiled.report.failures == ()
    assert str(compiled.report).endswith("1 kind of blocks, compiled before")


def _doubled(name: str, stored: Stored) -> Stored:
    return Stored(stored.tensor * 2, stored.scale)


def test_replaced_weights_take_effect_in_compiled_blocks(first: First):
    remote, request = first.remote, request_of(SIZES[0])
    (before,) = remote.steps([request])
    remote.replace_weights("double", ["blocks.0.ffn.0.weight"], _doubled)
    try:
        difference, compiled = both(remote, SIZES[0])
        (after,) = remote.steps([request], compiled=compiled)
    finally:
        remote.replace_weights(None, [], _doubled)
    assert difference <= TOLERANCE and compiled.report.graphs == 0
    assert relative_difference(after, before) > 100 * TOLERANCE


def test_a_cache_decides_as_it_does_without_compilation(first: First):
    remote, request = first.remote, request_of(SIZES[1])

    def run(threshold: float, compiled: CompiledSampling | None) -> tuple[list[int], Tensor]:
        cache = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=threshold))
        hits = []
        for _ in range(3):
            (result,) = remote.steps([request], cache=cache, compiled=compiled)
            hits.append(remote.last_step[0]["cache"]["hits"])
            assert len({told["cache"]["hits"] for told in remote.last_step}) == 1
        return hits, result

    compiled = CompiledSampling(CompileSettings())
    assert run(10.0, compiled)[0] == run(10.0, None)[0] == [0, 1, 1]
    (plain,) = remote.steps([request], compiled=compiled)
    assert torch.equal(run(0.0, compiled)[1], plain)


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


def test_cancel_in_the_middle_leaves_the_workers_usable(first: First, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_module, "_SLICE_S", 0.0005)
    remote, inputs = first.remote, WanInputs(frames=4, height=32, width=32)
    assert remote.group is not None
    pids = remote.group.pids

    def cancel_after(polls: int) -> Callable[[], None]:
        left = iter(range(polls))

        def poll() -> None:
            if next(left, None) is None:
                raise Cancelled

        return poll

    cancelled = 0
    for polls in (0, 1, 3, 6, 10, 20):
        compiled = CompiledSampling(CompileSettings())
        try:
            remote.steps([request_of(inputs)], compiled=compiled, poll=cancel_after(polls))
        except Cancelled:
            cancelled += 1
    assert cancelled >= 2
    difference, compiled = both(remote, inputs)
    assert difference <= TOLERANCE and compiled.report.failures == ()
    assert remote.group.pids == pids


def test_a_ring_of_the_same_workers(first: First, path: Path):
    assert first.remote.group is not None
    with loaded(first.remote.group, path, ring_degree=2) as ring:
        difference, compiled = both(ring, SIZES[1])
    assert difference <= TOLERANCE
    assert compiled.report.graphs == 0, "the exchange is no part of what is compiled"


@pytest.mark.extended
@pytest.mark.cpu_ranks("code of the C++ compiler")
def test_the_next_start_reads_what_was_compiled_also_on_unequal_ranks(first: First, folder: Path, path: Path):
    cold, warm = first.cold.report.seconds, []
    files = set(folder.rglob("*.so"))
    assert files
    while not warm or (warm[-1] > 0.5 * cold and len(warm) < 3):  # others may use this machine
        with Start("cpu*3,cpu,cpu", {VARIABLE: str(folder)}) as group, loaded(group, path) as remote:
            results = [both(remote, inputs) for inputs in SIZES]
        assert max(difference for difference, _ in results) <= TOLERANCE
        assert [compiled.report.graphs for _, compiled in results] == [1, 0, 0]
        assert not any(compiled.report.failures for _, compiled in results)
        warm.append(results[0][1].report.seconds)
    print(f"compilation: {cold:.1f} s; at the next start {', '.join(f'{seconds:.1f}' for seconds in warm)} s")
    assert set(folder.rglob("*.so")) == files, "one code for all sizes, so for theirs, too"
    assert min(warm) <= 0.5 * cold


@pytest.mark.extended
@pytest.mark.cpu_ranks("code of the C++ compiler")
def test_without_a_compiler_the_step_runs_and_the_cause_is_told(tmp_path: Path, path: Path):
    with (
        Start("cpu,cpu", {VARIABLE: str(tmp_path), "CXX": "/bin/false"}) as group,
        loaded(group, path) as remote,
    ):
        request, compiled = request_of(SIZES[0]), CompiledSampling(CompileSettings())
        (expected,) = remote.steps([request])
        (actual,) = remote.steps([request], compiled=compiled)
        assert torch.equal(actual, expected)
        report = compiled.report
        assert [rank for rank, _ in report.failures] == [0, 1]
        assert "WARNING: not compiled on worker rank 0 and 1 more: " in str(report)
        assert "Cxx" in report.failures[0][1] or "C++" in report.failures[0][1]
        began = time.monotonic()
        again = CompiledSampling(CompileSettings())
        remote.steps([request], compiled=again)
        assert again.report.seconds == 0 and again.report.failures == report.failures
        assert time.monotonic() - began < 10, "it has tried again"
