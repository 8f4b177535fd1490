"""What this machine has: `python -m tests.gpu.machine`. The last line is JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pytest")


def describe() -> dict[str, Any]:
    """Date, hardware and versions, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": _hardware(),
        "versions": _versions(),
    }


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": [], "peers": []}
    if not torch.cuda.is_available():
        return found
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "gib": round(properties.total_memory / 2**30, 1),
            }
        )
    pairs = permutations(range(len(found["gpus"])), 2)
    found["peers"] = [f"{a}→{b}" for a, b in pairs if torch.cuda.can_device_access_peer(a, b)]
    found["topology"] = _says("nvidia-smi", "topo", "-m")
    return found


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["cudnn"] = str(torch.backends.cudnn.version())
        driver = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = driver.splitlines()[0] if driver else None
    return versions


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _says(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    result = describe()
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items() if version))
    print(f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores")
    for number, gpu in enumerate(result["hardware"]["gpus"]):
        print(f"cuda:{number}: {gpu['name']}, {gpu['gib']} GiB, compute capability {gpu['capability']}")
    print(f"peer access: {', '.join(result['hardware']['peers']) or 'none'}")
    print(result["hardware"].get("topology") or "no topology")
    print(json.dumps(result))
