"""Oldest supported versions of ComfyUI, Python and torch, which this pack does not install. For the rest see
requirements.txt."""

from __future__ import annotations

import importlib.metadata
import re

from .errors import UnsupportedError

OLDEST_COMFYUI = "0.21.0"
"""Oldest version with which parts of the tests have run; pyproject.toml declares it to the registry."""
NEWEST_COMFYUI = "0.33.0"
"""Newest version with which the tests have run; for messages."""
OLDEST_PYTHON = "3.10"
OLDEST_TORCH = "2.9"
"""Oldest tested version, as 2.9.1; 2.6 failed, no version between them was tried."""


def require(name: str, found: str, oldest: str) -> None:
    """Refuses a version older than `oldest`, e.g. 2.8.0+cu128 than 2.9.

    Raises:
        UnsupportedError: `found` is older; the message names both versions.
    """
    if _numbers(found) < _numbers(oldest):
        raise UnsupportedError(f"{name} is {found}; Sequence Parallel needs {oldest} or newer")


def _numbers(version: str) -> list[int]:
    """Parses a version: `2.13.0+cpu` → [2, 13, 0]; stops at the first part that is not a number."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in leading[0].split(".")] if leading else []


_IMPORTED_BY_DIFFUSERS = (
    "torch", "diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "torchao", "bitsandbytes", "gguf",
    "optimum-quanto", "onnxruntime", "numpy",
)  # fmt: skip


def describe_libraries() -> str:
    """Lists the versions of diffusers and of its installed imports, for a message."""
    found = []
    for name in _IMPORTED_BY_DIFFUSERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
