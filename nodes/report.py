"""What to send with a question or a bug report: versions, devices, settings, the workers' state, the last errors."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import comfyui_version
import torch

from ..parallel import __version__
from ..parallel.errors import ConfigError
from ..parallel.host import running, status
from . import settings

_PACKAGES = (
    "diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "safetensors", "torchao", "bitsandbytes",
    "sageattention", "comfyui-frontend-package",
)  # fmt: skip


def report() -> str:
    """Markdown. Models are named without their folders; errors are as they were shown."""
    try:
        stored: object = dataclasses.asdict(settings.read())
    except ConfigError as error:
        stored = str(error)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]  # none without CUDA
    lines = [
        "### Sequence Parallel report",
        "",
        f"- Sequence Parallel {__version__}, ComfyUI {comfyui_version.__version__}",
        f"- Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"- {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        f"- {platform.platform()}; GPUs: {', '.join(devices) or 'none'}",
        f"- settings: {json.dumps(stored)}",
        "",
        "Workers:",
        "```json",
        json.dumps(running.snapshot(), indent=1),
        "```",
        "",
        "Last errors:",
        "```",
        *(f"{_time(event.time)} {event.kind}: {event.text}" for event in status.errors()),
        "```",
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
