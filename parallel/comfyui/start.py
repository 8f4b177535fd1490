"""Makes ComfyUI importable in a worker. Imports nothing of it before that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from ..vae.arguments import restore


def prepare(folder: str, arguments: Mapping[str, Any]) -> None:
    """Sets ComfyUI's parsed arguments as the host's are: it decides on devices and dtypes when it is imported.

    Args:
        folder: of the host's ComfyUI.
        arguments: `vae.arguments.as_plain` of its command line.
    """
    if folder not in sys.path:
        sys.path.append(folder)
    if "comfy.model_management" in sys.modules:
        return
    module = importlib.import_module("comfy.cli_args")
    for name, value in restore(arguments, module).items():
        setattr(module.args, name, value)
