"""What the ranks of the distributed tests run on: `pytest tests/distributed --devices cpu|cuda|shared`.

Tests write their device lists as CPU ranks (`cpu*3,cpu`). `on_ranks` puts them on devices of the chosen kind, where a
list meets the engine.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from parallel import shared_gpu

VARIABLE = "SEQUENCE_PARALLEL_TEST_DEVICES"
"""Carries the kind to the processes that tests start."""


@dataclass(frozen=True)
class Kind:
    """One kind of devices, and how exact fp32 is on it, as the largest relative difference allowed."""

    title: str
    split: float = 1e-5
    """Of many ranks from one of the same kind."""
    process: float = 1e-5
    """Of ranks from the test's own process, which computes on the CPU."""
    reference: float = 1e-4
    """From what ComfyUI or diffusers computed on a CPU."""


# On CUDA, TF32 is off (see `choose`), so what differs from a CPU is the order of sums.
KINDS = {
    "cpu": Kind("CPU ranks"),
    "cuda": Kind("one GPU per rank", process=1e-4),
    "shared": Kind("ranks that share cuda:0", process=1e-4),
}


def choose(name: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Takes this kind for the tests of this process, and of those that it starts."""
    environment[VARIABLE] = name
    if name != "cpu":
        environment["NVIDIA_TF32_OVERRIDE"] = "0"  # cuDNN's convolutions, the patch embeddings, else use it
    if name == "shared":
        environment[shared_gpu.VARIABLE] = "1"


def chosen() -> str:
    return os.environ.get(VARIABLE, "cpu")


def kind() -> Kind:
    return KINDS[chosen()]


def on_ranks(devices: str) -> str:
    """`cpu*3,cpu` → `cuda:0*3,cuda:1` or `cuda:0*3,cuda:0`. Skips what needs more GPUs than there are."""
    name = chosen()
    ranks = devices.split(",")
    if name == "cpu" or not devices.startswith("cpu"):
        return devices
    if name == "cuda" and len(ranks) > torch.cuda.device_count():
        pytest.skip(f"needs {len(ranks)} CUDA devices", allow_module_level=True)
    return ",".join(
        rank.replace("cpu", f"cuda:{i if name == 'cuda' else 0}", 1) for i, rank in enumerate(map(str.strip, ranks))
    )


def most_ranks(wanted: int) -> int:
    """As many of them as there are devices for."""
    return min(wanted, max(1, torch.cuda.device_count())) if chosen() == "cuda" else wanted


def device_of(rank: int) -> torch.device:
    """Where this rank computes."""
    return torch.device({"cpu": "cpu", "cuda": f"cuda:{rank}", "shared": "cuda:0"}[chosen()])


def rank_environment(rank: int) -> dict[str, str]:
    """What a process that is this rank needs beside the environment of the test."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return own | (shared_gpu.nccl_variables(rank) if chosen() == "shared" else {})


def meet(rank: int, world: int, store: str, timeout_s: float = 60) -> torch.device:
    """Joins the process group of `world` ranks by the file `store`; the device of this rank."""
    torch.set_num_threads(1)
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return device
