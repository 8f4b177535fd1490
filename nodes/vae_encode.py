"""VAE Encode (Parallel): ComfyUI's VAE Encode (Tiled), its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from ..parallel.errors import ConfigError
from .parallel_vae import run_tiled
from .sp_config import SPConfig


class SPVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPVAEEncode",
            display_name="VAE Encode (Parallel)",
            category="sequence parallel",
            description=(
                "Encodes tiles on all devices at once. The latent is that of VAE Encode (Tiled) with the same"
                " settings, bit for bit."
            ),
            inputs=[
                io.Image.Input("pixels", tooltip="Pictures, or the frames of one video."),
                io.Vae.Input("vae", tooltip="From Load VAE; the workers are sent its weights once."),
                io.Int.Input(
                    "tile_size", default=512, min=64, max=4096, step=64, tooltip="Height and width, in pixels."
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=4096,
                    step=32,
                    tooltip="Pixels that neighbouring tiles share and blend.",
                ),
                io.Int.Input(
                    "temporal_size",
                    default=64,
                    min=8,
                    max=4096,
                    step=4,
                    tooltip="Video only: frames to encode at a time.",
                ),
                io.Int.Input(
                    "temporal_overlap",
                    default=8,
                    min=4,
                    max=4096,
                    step=4,
                    tooltip="Video only: frames that neighbouring tiles share and blend.",
                ),
                SPConfig.Input(
                    "sp_config",
                    optional=True,
                    tooltip="Devices. Without it: those of the workers that run already, or of the setting Default"
                    " devices.",
                ),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, vae: Any, tile_size: int, overlap: int, sp_config: SequenceParallelConfig | None = None, **inputs: Any
    ) -> io.NodeOutput:
        # Pictures are cut three times, also into tiles of half the height or width.
        limit = tile_size // 2 if vae.latent_dim == 2 else tile_size
        if overlap >= limit:
            raise ConfigError(f"overlap is {overlap}; allowed with tile_size {tile_size} are less than {limit}")
        inputs |= {"tile_size": tile_size, "overlap": overlap}
        return io.NodeOutput(*run_tiled("VAEEncodeTiled", vae, sp_config, cls.hidden.unique_id, **inputs))
