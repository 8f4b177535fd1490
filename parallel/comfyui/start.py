"""Makes ComfyUI importable in a worker. Imports nothing of it before that."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..vae.arguments import restore


def find() -> str:
    """Returns the folder of ComfyUI: `COMFYUI_PATH`, or the one that this pack is installed in.

    Raises:
        ConfigError: there is none.
    """
    explicit = os.environ.get("COMFYUI_PATH")
    folder = Path(explicit) if explicit else Path(__file__).absolute().parents[4]
    if (folder / "comfy" / "ldm").is_dir():
        return str(folder)
    if explicit:
        raise ConfigError(f"COMFYUI_PATH is {explicit!r}, which has no folder comfy/ldm; give ComfyUI's own folder")
    raise ConfigError("no ComfyUI encloses this pack; set COMFYUI_PATH to its folder")


def prepare(folder: str, arguments: Mapping[str, Any]) -> None:
    """Sets ComfyUI's parsed arguments to the host's, since ComfyUI chooses devices and dtypes when it is imported.

    Args:
        folder: folder of the host's ComfyUI.
        arguments: `vae.arguments.as_plain` of the host's command line.
    """
    if folder not in sys.path:
        sys.path.append(folder)
    if "comfy.model_management" in sys.modules:
        return
    module = importlib.import_module("comfy.cli_args")
    for name, value in restore(arguments, module).items():
        setattr(module.args, name, value)
