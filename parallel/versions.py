"""How old a user's ComfyUI and torch may be, neither of which this pack installs. For the rest see requirements.txt."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from packaging.requirements import Requirement

from .errors import UnsupportedError

OLDEST_COMFYUI = "0.21.0"
"""The first that has every family; pyproject.toml tells it to the registry."""
OLDEST_TORCH = "2.9"
"""The oldest tested, as 2.9.1. FSDP2 of 2.6 does not shard fp8 weights beside others; nothing between was tried."""


def require(name: str, found: str, oldest: str) -> None:
    """Refuses a version older than `oldest`, e.g. 2.8.0+cu128 than 2.9.

    Raises:
        UnsupportedError: naming both.
    """
    if _numbers(found) < _numbers(oldest):
        raise UnsupportedError(f"{name} is {found}; Sequence Parallel needs {oldest} or newer")


def _numbers(version: str) -> list[int]:
    """`2.13.0+cpu` → [2, 13, 0]; what is no number ends it."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in leading[0].split(".")] if leading else []


_IMPORTED_BY_DIFFUSERS = (
    "torch", "diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "torchao", "bitsandbytes", "gguf",
    "optimum-quanto", "onnxruntime", "numpy",
)  # fmt: skip


def describe_libraries() -> str:
    """Versions of diffusers and of what it imports, for a message; packages that are not installed are left out."""
    found = []
    for name in _IMPORTED_BY_DIFFUSERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def conflicts() -> Iterator[str]:
    """A sentence for each requirement of diffusers, or of what it imports, that another package's version breaks.

    Packs install in turn, and pip then only warns. The most frequent case: transformers 4 needs a huggingface-hub older
    than diffusers 0.40 and newer accept.
    """
    for name in ("diffusers", "transformers", "peft", "accelerate"):
        try:
            version, lines = importlib.metadata.version(name), importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                yield (
                    f"{name} {version} needs {requirement.name}{requirement.specifier}, and {found} is installed:"
                    " models may not load. `pip install -U -r requirements.txt` in this pack's folder, with the Python"
                    " that runs ComfyUI, brings a set that fits; beside transformers 4 it is diffusers 0.39"
                )
