"""ComfyUI-SequenceParallel: every denoising step of one video on all GPUs."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
