"""Where ComfyUI is, and which Python runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).absolute().parents[2]
PACK_NAME = "ComfyUI-SequenceParallel"

# A few modules that stand for ComfyUI's requirements and the pack's.
REQUIRED_MODULES = (
    "torch",
    "torchsde",
    "torchvision",
    "torchaudio",
    "aiohttp",
    "alembic",
    "av",
    "einops",
    "transformers",
    "safetensors",
    "comfyui_frontend_package",
)


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout with a Python that can run it."""

    path: Path
    python: Path


def find_installation() -> tuple[Installation | None, str]:
    """The installation to test against, or None and the reason why there is none."""
    path = _find_comfyui()
    if path is None:
        return None, "no ComfyUI found (set COMFYUI_PATH)"
    explicit = os.environ.get("COMFYUI_PYTHON")
    missing = "no such file"
    for python in [Path(explicit)] if explicit else _candidate_pythons(path):
        if not python.exists():
            continue
        missing = _missing_modules(python)
        if not missing:
            return Installation(path, python), ""
    if explicit:
        return None, f"COMFYUI_PYTHON={explicit} cannot run ComfyUI: {missing}"
    return None, f"no Python found that can run the ComfyUI at {path} (set COMFYUI_PYTHON)"


def _find_comfyui() -> Path | None:
    explicit = os.environ.get("COMFYUI_PATH")
    if explicit:
        candidates = [Path(explicit)]
    else:
        candidates = [Path.home() / "comfy" / "ComfyUI"]
        if REPOSITORY.parent.name == "custom_nodes":
            candidates.insert(0, REPOSITORY.parent.parent)
    return next((path for path in candidates if (path / "main.py").is_file() and (path / "comfy").is_dir()), None)


def _candidate_pythons(comfyui: Path) -> list[Path]:
    folders = [comfyui.parent / "venv", comfyui / "venv", comfyui / ".venv"]
    return [folder / "bin" / "python" for folder in folders] + [Path(sys.executable)]


@cache
def _missing_modules(python: Path) -> str:
    """Names of the missing modules; empty when this Python is good enough."""
    code = (
        "import importlib.util, sys\n"
        "print(', '.join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
    )
    found = subprocess.run([python, "-c", code, *REQUIRED_MODULES], capture_output=True, text=True, timeout=60)
    if found.returncode:
        return found.stderr.strip().splitlines()[-1] if found.stderr.strip() else f"exit status {found.returncode}"
    names = found.stdout.strip()
    return f"missing {names}" if names else ""
