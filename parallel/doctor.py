"""`python -m parallel doctor`: what works on this machine, and what to do where it does not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import Layout, SequenceParallelConfig, resolve
from .errors import ConfigError, EngineError
from .host.group import WorkerGroup
from .versions import OLDEST_TORCH, require
from .wire.messages import Echo
from .wire.shared import lay_out

_HEADS = 24
"""HunyuanVideo's and FLUX's attention heads: the plan shown is theirs, without CFG."""
_REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def examine(devices: str) -> tuple[dict[str, Any], str]:
    """Runs the checks in order; later ones need the earlier ones.

    Returns:
        `ok`, `checks` (name, ok, detail), `plan` (the degrees, or None) and `reason` (why that plan, or what failed);
        and the same as text.
    """
    layout: Layout | None = None

    def plan() -> str:
        nonlocal layout
        layout = resolve(SequenceParallelConfig(devices=devices))
        degrees, why = layout.degrees.choose(conditions=1, heads=_HEADS)
        return f"{layout.describe()} ({layout.reason}): {degrees} ({why})"

    def workers() -> str:
        assert layout is not None
        return _try_workers(layout)

    steps: list[tuple[str, Callable[[], str]]] = [
        ("libraries", _libraries),
        ("system", _system),
        ("plan", plan),
        ("workers", workers),
    ]
    checks: list[dict[str, Any]] = []
    for name, check in steps:
        try:
            checks.append({"name": name, "ok": True, "detail": check()})
        except (EngineError, importlib.metadata.PackageNotFoundError) as error:
            checks.append({"name": name, "ok": False, "detail": str(error)})
            break
    ok = all(check["ok"] for check in checks)
    degrees = layout.degrees.choose(conditions=1, heads=_HEADS)[0] if layout else None
    result = {
        "ok": ok,
        "checks": checks,
        "plan": dataclasses.asdict(degrees) if degrees else None,
        "reason": layout.reason if ok and layout else checks[-1]["detail"],
    }
    return result, "\n".join(f"{'ok  ' if c['ok'] else 'FAIL'} {c['name']}: {c['detail']}" for c in checks)


def _libraries() -> str:
    lines = [line.strip() for line in _REQUIREMENTS.read_text().splitlines()]
    oldest = {"torch": OLDEST_TORCH} | dict(line.partition(">=")[::2] for line in lines if line and line[0] != "#")
    found = {name: importlib.metadata.version(name) for name in oldest}
    for name in oldest:
        require(name, found[name], oldest[name])
    return f"Python {platform.python_version()}, {', '.join(f'{name} {version}' for name, version in found.items())}"


def _system() -> str:
    if platform.system() != "Linux":
        raise ConfigError(f"this is {platform.system()}; workers need Linux (on Windows use WSL2)")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return f"{platform.platform()}, {os.cpu_count()} cores, GPUs: {', '.join(gpus) or 'none'}"


def _try_workers(layout: Layout) -> str:
    """Starts the group, sends a tensor through it and ends it."""
    group = WorkerGroup(layout)
    group.start()
    try:
        x = torch.arange(1024, dtype=torch.float32)
        (source, target), size = lay_out("doctor", [(x.shape, x.dtype)] * 2)
        segment = group.memory.segment("doctor", size)
        segment.tensor(source).copy_(x)
        group.call(Echo(x=source, out=target))
        if not torch.equal(segment.tensor(target), x):
            raise ConfigError("a tensor came back from the workers changed; please report this")
        return f"{layout.world_size} started, met and answered (pids {', '.join(map(str, group.pids))})"
    finally:
        group.stop()
