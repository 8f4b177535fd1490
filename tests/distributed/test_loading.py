"""What loading costs: for each worker the memory of its weights and little more, and for two no more time than for one.

SP_LOADING_MB sets the size of the checkpoint in MB (default 400).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import SequenceParallelConfig, resolve
from parallel.demo.checkpoint import write_tiny_hunyuan_video
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from tests.distributed.process_facts import MemoryPeaks, cpu_seconds
from tests.distributed.tiny_models import recipe_of

pytestmark = [pytest.mark.slow, pytest.mark.cpu_ranks("resident memory and processor time")]

MB = 10**6
SIZE = int(os.environ.get("SP_LOADING_MB", "400")) * MB
BLOCK = 62 * MB
"""Bytes of one single-stream block of 8 heads in fp32 (12 × 1024² weights and a few more)."""


@dataclass
class Load:
    """What one fresh group measured."""

    ready_s: float
    """From the start of the processes to the loaded model."""
    cpu_s: float
    """Processor time of the busiest worker until then."""
    resident: int
    """Bytes of weights in each worker."""
    anonymous: list[int]
    """Peak of each worker's own memory."""
    mapped: list[int]
    """Peak of the file's pages (and the libraries') in each worker, beyond what it had before."""
    host: int
    """Peak of this process's own memory, beyond what it had before."""


def load(path: Path, devices: str, **recipe: Any) -> Load:
    began = time.perf_counter()
    group = WorkerGroup(resolve(SequenceParallelConfig(devices=devices)), threads=1)
    group.start()
    try:
        model = RemoteModel(recipe_of(path, devices, **recipe), group=group)
        with (
            MemoryPeaks([*group.pids, os.getpid()]) as own,
            MemoryPeaks(group.pids, "File") as mapped,
        ):
            resident = model.ensure_loaded()
            ended = time.perf_counter()
        return Load(
            ready_s=ended - began,
            cpu_s=max(cpu_seconds(pid) for pid in group.pids),
            resident=resident,
            anonymous=[own.peak[pid] for pid in group.pids],
            mapped=[mapped.peak[pid] - mapped.before[pid] for pid in group.pids],
            host=own.peak[os.getpid()] - own.before[os.getpid()],
        )
    finally:
        group.stop()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About SIZE bytes of fp32, in the page cache."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    write_tiny_hunyuan_video(path, heads=8, depth=1, depth_single=max(1, SIZE // BLOCK - 4))
    path.read_bytes()
    yield path
    path.unlink()


@pytest.mark.parametrize("storage", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_each_worker_holds_its_weights_once(checkpoint: Path, storage: torch.dtype):
    found = load(checkpoint, "cpu,cpu", weight_dtype=storage)
    print(found)
    for anonymous, mapped in zip(found.anonymous, found.mapped, strict=True):
        assert anonymous <= found.resident + 500 * MB
        assert mapped <= 250 * MB  # libraries, and one tensor at a time
    assert found.host <= 100 * MB


@pytest.mark.extended
def test_two_workers_are_ready_as_soon_as_one(checkpoint: Path):
    """Both read the file at once, from the page cache, and neither does more for it than one alone.

    Judged by processor time, of which two took 1.0 to 1.1 times as much each: the time on the clock, which `-s` shows,
    depends on what else runs.
    """
    rounds = [(load(checkpoint, "cpu"), load(checkpoint, "cpu,cpu")) for _ in range(2)]
    for one, two in rounds:
        print(f"ready after {one.ready_s:.1f} s and {two.ready_s:.1f} s: {two.ready_s / one.ready_s:.2f} times")
        print(f"processor time {one.cpu_s:.1f} s and {two.cpu_s:.1f} s: {two.cpu_s / one.cpu_s:.2f} times")
    assert min(two.cpu_s for _, two in rounds) <= 1.4 * min(one.cpu_s for one, _ in rounds)
