"""The environment that a worker really has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel.config import SequenceParallelConfig, resolve
from parallel.host import process
from parallel.host.group import WorkerGroup

pytestmark = pytest.mark.cpu_ranks("other kinds add variables of NCCL")


def environment_of_worker() -> dict[str, str]:
    """Of a worker that is started now."""
    group = WorkerGroup(resolve(SequenceParallelConfig(devices="cpu")), threads=1)
    group.start()
    try:
        entries = Path(f"/proc/{group.pids[0]}/environ").read_text().split("\0")
    finally:
        group.stop()
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_a_worker_does_not_get_the_allocator_that_comfyui_chose_for_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")  # after the start, as ComfyUI does
    monkeypatch.setenv("LOCAL_RANK", "5")
    host, worker = dict(os.environ), environment_of_worker()
    assert {name: value for name, value in worker.items() if host.get(name) != value} == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **{name: value for name, value in CHOSEN.items() if host.get(name) != value},
    }
    assert host.keys() - worker.keys() == {"LOCAL_RANK"}


def test_a_worker_gets_the_allocator_that_the_user_chose(monkeypatch: pytest.MonkeyPatch):
    """That of a ComfyUI that was started under it."""
    users = process.initial_environment() | {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    monkeypatch.setattr(process, "initial_environment", lambda: users)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,backend:cudaMallocAsync")
    assert environment_of_worker()["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


CHOSEN = {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "NCCL_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
