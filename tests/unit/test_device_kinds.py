"""The kinds of devices that the distributed tests run on: device lists, processes, and what is skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import shared_gpu
from parallel.config import SequenceParallelConfig, resolve
from tests.distributed import devices

ROOT = Path(__file__).parents[2]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Takes a kind, with so many GPUs."""

    def take(kind: str, gpus: int = 0) -> None:
        environment: dict[str, str] = {}
        devices.choose(kind, environment)
        monkeypatch.delenv(shared_gpu.VARIABLE, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return take


@pytest.mark.parametrize(
    ("kind", "gpus", "expected"),
    [("cpu", 0, "cpu*3,cpu,cpu"), ("cuda", 4, "cuda:0*3,cuda:1,cuda:2"), ("shared", 1, "cuda:0*3,cuda:0,cuda:0")],
)
def test_a_device_list_is_put_on_the_kind_and_the_engine_takes_it(use, kind: str, gpus: int, expected: str):
    use(kind, gpus)
    placed = devices.on_ranks("cpu*3,cpu,cpu")
    assert placed == devices.on_ranks(placed) == expected
    layout = resolve(SequenceParallelConfig(devices=placed))
    assert layout.describe() == expected
    assert [device.name for device in layout.devices] == [str(devices.device_of(rank)) for rank in range(3)]


def test_more_ranks_than_gpus_are_skipped(use):
    use("cuda", 2)
    assert devices.on_ranks("cpu,cpu") == "cuda:0,cuda:1"
    assert devices.most_ranks(4) == 2
    with pytest.raises(pytest.skip.Exception, match="needs 3 CUDA devices"):
        devices.on_ranks("cpu,cpu,cpu")


def test_only_ranks_that_share_a_gpu_are_hosts_of_their_own(use):
    use("cuda", 2)
    assert "NCCL_HOSTID" not in devices.rank_environment(1)
    use("shared", 1)
    assert [devices.rank_environment(rank)["NCCL_HOSTID"] for rank in range(2)] == [
        "sequence-parallel-0",
        "sequence-parallel-1",
    ]


def test_every_kind_says_how_exact_it_is():
    for kind in devices.KINDS.values():
        assert 0 < kind.split <= kind.process <= kind.reference <= 1e-4


def test_on_gpus_what_is_about_cpu_ranks_is_skipped_by_name():
    """Collected and skipped without a GPU: a module that would start workers is not run."""
    command = [sys.executable, "-m", "pytest", "tests/distributed/test_loading.py", "--devices=shared", "-q", "-m="]
    environment = {name: value for name, value in os.environ.items() if name != devices.VARIABLE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"skipped: [1-9]\d* \(CPU ranks only: resident memory and processor time\)", done.stdout)
    assert "passed" not in done.stdout
