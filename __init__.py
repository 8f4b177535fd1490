"""ComfyUI-SequenceParallel: every denoising step of one video on all GPUs."""

import sys

if sys.platform != "linux":
    raise ImportError("ComfyUI-SequenceParallel needs Linux. On Windows, run ComfyUI in WSL2; macOS is not supported.")

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
