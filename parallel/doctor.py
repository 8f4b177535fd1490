"""`python -m parallel doctor`: checks what works on this machine, and advises on what does not.

The checks themselves import torch and the modules that need it, so that a missing or broken torch is a finding.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, EngineError, UnsupportedError
from .versions import OLDEST_TORCH, require

if TYPE_CHECKING:
    from .config import Layout

log = logging.getLogger("sequence_parallel")

_HEADS = 24
"""Number of attention heads of HunyuanVideo and FLUX: the plan shown is for them, without CFG."""
_NO_CUDA = "torch cannot use the GPUs; look whether nvidia-smi works, and whether the driver is new enough for its CUDA"
_REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def examine(devices: str) -> tuple[dict[str, Any], str]:
    """Runs the checks in order until one fails; later ones need the earlier ones.

    Returns:
        `ok`, `checks` (name, ok, detail), `plan` (the degrees, or None) and `reason` (of the devices, or of the
        failure); and the checks as text.
    """
    layout: Layout | None = None

    def plan() -> str:
        from .config import SequenceParallelConfig, resolve

        nonlocal layout
        layout = resolve(SequenceParallelConfig(devices=devices))
        degrees, why = layout.degrees.choose(conditions=1, heads=_HEADS)
        return f"{layout.describe()} ({layout.reason}): {degrees} ({why})"

    def workers() -> str:
        assert layout is not None
        return _try_workers(layout)

    steps: list[tuple[str, Callable[[], str]]] = [
        ("libraries", _libraries),
        ("torch", load_torch),
        ("system", lambda: _system(devices)),
        ("plan", plan),
        ("workers", workers),
    ]
    checks: list[dict[str, Any]] = []
    for name, check in steps:
        try:
            checks.append({"name": name, "ok": True, "detail": check()})
        except Exception as error:
            log.debug("the check failed", exc_info=True)
            detail = str(error) if isinstance(error, EngineError) else _in_one_line(error)
            checks.append({"name": name, "ok": False, "detail": detail})
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
    found = {}
    for name in oldest:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "torch" or importlib.util.find_spec(name) is None:  # a torch in PYTHONPATH may lack metadata
                raise UnsupportedError(_missing(name)) from None
        else:
            require(name, found[name], oldest[name])
    return f"Python {platform.python_version()}, {', '.join(f'{name} {version}' for name, version in found.items())}"


def load_torch() -> str:
    """Imports torch.

    Returns:
        Its version and that of CUDA.

    Raises:
        UnsupportedError: torch is missing, too old, or cannot be imported.
    """
    try:
        import torch
    except Exception as error:  # OSError where a library of CUDA's is missing; a damaged torch raises anything
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise UnsupportedError(_missing("torch")) from None
        raise UnsupportedError(
            f"torch cannot be imported: {_in_one_line(error)}; reinstall it in this Python ({sys.executable}), or use"
            " the one that runs ComfyUI"
        ) from error
    require("torch", str(getattr(torch, "__version__", "without a version")), OLDEST_TORCH)
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"


def _missing(name: str) -> str:
    return (
        f"{name} is not installed in this Python ({sys.executable}); use the one that runs ComfyUI, or install {name}"
        f"{f' {OLDEST_TORCH} or newer' if name == 'torch' else ''}"
    )


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _system(devices: str) -> str:
    if platform.system() != "Linux":
        raise ConfigError(f"this is {platform.system()}; workers need Linux (on Windows use WSL2)")
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            available = torch.cuda.is_available()
            gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
        except Exception as error:
            raise UnsupportedError(f"{_NO_CUDA}: {_in_one_line(error)}") from error
    # Torch reports a driver that it cannot use in this way, and then sees no GPU; without a driver it reports nothing.
    reasons = [text for each in caught if "CUDA initialization" in (text := str(each.message))]
    if reasons and not available and "cpu" not in devices.lower():
        raise UnsupportedError(f"{_NO_CUDA}: {' '.join(reasons[0].split())}")
    return f"{platform.platform()}, {os.cpu_count()} cores, GPUs: {', '.join(gpus) or 'none'}"


def _try_workers(layout: Layout) -> str:
    """Starts the group, sends a tensor through it and ends it."""
    import torch

    from .host.group import WorkerGroup
    from .wire.messages import Echo
    from .wire.shared import lay_out

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
