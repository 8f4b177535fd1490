"""Environment variables of the worker processes; this is the only place that sets them.

A worker inherits the environment of its host, except for the variables in the tables below. `CUDA_VISIBLE_DEVICES` is
inherited unchanged: `cuda:1` in a device list is an index into the host's devices. `NCCL_*`, `TORCH_*`,
`PYTORCH_TUNABLEOP_*`, `CUDA_LAUNCH_BLOCKING`, `HF_HOME`, … are inherited, so that a user can set them for the workers,
too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .. import shared_gpu

ALWAYS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of one worker would steal the cores of another
    # Keep freed memory for the next layer: on a CPU, fetching it from the system again costs a page fault each.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "GLOO_SOCKET_IFNAME": "lo",  # the ranks are on one machine, and nothing listens beyond loopback
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",  # a worker downloads nothing
    "PYTHONUNBUFFERED": "1",  # the last lines of a process that was killed are the interesting ones
}
"""Variables set in every worker, whatever the host has; in addition, `OMP_NUM_THREADS` is its number of threads."""

DROPPED = frozenset(
    {
        # Another launcher's process group: a worker gets its rank from its host, and libraries that find these look
        # for peers that do not exist.
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
        "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
        # Written for one process per machine: the threads of all workers would be bound to the same cores.
        "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY",
    }
)  # fmt: skip
"""Variables of the host that a worker does not inherit."""

ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables of PyTorch's CUDA allocator, passed on as the user set them. PyTorch 2.13 reads the first one and, without
it, the second one; builds of mid-2025 used the opposite order. A worker has both only if the user set both."""

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Default allocator setting, used unless the user set one of `ALLOCATOR_NAMES`.

Shapes change with every prompt, size and cache hit; expandable segments grow and leave no holes of the old size behind.
Where the CUDA driver API is not available to PyTorch (ROCm, Windows), it warns and ignores the option. NCCL
registers no tensors here (that takes a `MemPool` or user buffers), and no tensor is shared by CUDA IPC, which
expandable segments support only by passing file descriptors."""

_COMFYUI = "backend:cudaMallocAsync"
_COMFYUI_SUFFIX = re.compile(rf"(?:(?:^|,){re.escape(_COMFYUI)})+$")
"""Matches the suffix that ComfyUI's cuda_malloc.py sets or appends in its own process. When ComfyUI-Manager restarts
ComfyUI by `execv`, the new process inherits the suffix and appends it once more."""


def worker_environment(
    base: Mapping[str, str], initial: Mapping[str, str], *, threads: int, rank: int
) -> dict[str, str]:
    """Returns the environment of the worker `rank`.

    Args:
        base: current environment of the host.
        initial: environment that the host was started with, see `initial_environment`; empty if unknown.
        threads: number of CPU threads of the worker.
    """
    environment = {name: value for name, value in base.items() if name not in DROPPED}
    environment |= ALWAYS | {"OMP_NUM_THREADS": str(threads)}
    # Every worker compiles; by default each would do so with as many processes as there are cores.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    for name in ALLOCATOR_NAMES:
        environment.pop(name, None)
    environment |= _users_allocator(initial or base) or ALLOCATOR
    if shared_gpu.allowed(base):
        environment |= shared_gpu.nccl_variables(rank)
    return environment


def initial_environment() -> dict[str, str]:
    """Returns the environment that this process was started with; empty if it cannot be read.

    `os.environ` also contains changes that ComfyUI and its packs have made since. A process that has set its own title
    (`setproctitle`) has overwritten the initial environment; entries without `=` reveal that.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = [entry.decode(errors="surrogateescape").partition("=") for entry in entries if entry]
    return {name: value for name, _, value in pairs} if all(equals for _, equals, _ in pairs) else {}


def _users_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the allocator variables that the user set, without the suffix that ComfyUI adds to the first of them."""
    found = {name: environment[name] for name in ALLOCATOR_NAMES if environment.get(name)}
    if "PYTORCH_CUDA_ALLOC_CONF" in found:
        users = _COMFYUI_SUFFIX.sub("", found.pop("PYTORCH_CUDA_ALLOC_CONF"))
        if users:
            found["PYTORCH_CUDA_ALLOC_CONF"] = users
    return found
