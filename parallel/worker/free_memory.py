"""Free memory of a device and of the machine or container."""

from __future__ import annotations

from pathlib import Path

import torch

from ..placement import Memory

_CGROUP = Path("/sys/fs/cgroup")


def device_memory(device: torch.device) -> Memory:
    """Returns the memory that this process can still allocate on the device, including PyTorch's cached blocks."""
    if device.type != "cuda":
        return host_memory()
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(free=free + unused, total=total)


def host_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> Memory:
    """Returns the host memory available without swapping, within the container's limit, if there is one.

    Args:
        cgroup: folder of the control group (v2: `memory.max`; v1: `memory/memory.limit_in_bytes`).
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    for folder, limit, usage in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # reclaimed when memory is needed
        free, total = min(free, most - used + files), min(total, most)
    return Memory(free=max(0, free), total=total)
