"""The pack ComfyUI-GGUF in this ComfyUI, if it is installed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import comfy.model_patcher

from ..parallel.comfyui import gguf


def pack_folder() -> str:
    """Returns the folder from which ComfyUI has loaded the pack; empty if it is not loaded."""
    return gguf.installed(_nodes())


def gguf_patcher() -> type[comfy.model_patcher.ModelPatcher]:
    """Returns the pack's ModelPatcher class, which patches unquantised weights in fp32, whatever the device."""
    module: Any = sys.modules[_nodes()[gguf.LOADER].__module__]
    patcher: type[comfy.model_patcher.ModelPatcher] = module.GGUFModelPatcher
    return patcher


def _nodes() -> dict[str, type]:
    loaded: dict[str, type] = importlib.import_module("nodes").NODE_CLASS_MAPPINGS  # ComfyUI's, not this pack's
    return loaded
