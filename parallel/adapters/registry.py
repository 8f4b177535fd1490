"""The families this engine knows. Adding one: a new file beside this one, and a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

from ..checkpoints.source import Source
from ..errors import UnsupportedError
from .base import Adapter
from .cogvideox import CogVideoXAdapter
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .hunyuan_video import HunyuanVideoAdapter
from .hunyuan_video_15 import HunyuanVideo15Adapter
from .ltxv import LTXVAdapter
from .mochi import MochiAdapter
from .qwen_image import QwenImageAdapter
from .wan import WanAdapter

FAMILIES: dict[str, type[Adapter]] = {
    adapter.family: adapter
    for adapter in (
        HunyuanVideoAdapter, HunyuanVideo15Adapter, FluxAdapter, Flux2Adapter, WanAdapter, CogVideoXAdapter,
        MochiAdapter, LTXVAdapter, QwenImageAdapter,
    )
}  # fmt: skip


def adapter_for(source: Source) -> Adapter:
    """The adapter of a checkpoint's family.

    Raises:
        UnsupportedError: no family recognises the checkpoint.
    """
    for adapter in FAMILIES.values():
        if source.config is not None:
            if adapter.detect_diffusers(source.config):
                return adapter()
        elif adapter.detect(source.tensors):
            return adapter()
    what = source.config.get("_class_name") if source.config is not None else "its tensor names are of no known family"
    titles = "; ".join(adapter.title for adapter in FAMILIES.values())
    raise UnsupportedError(f"{source.path} is not supported yet ({what}); supported families: {titles}")
