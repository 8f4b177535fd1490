"""VAE Encode (Parallel): ComfyUI's VAE Encode (Tiled), its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from ..parallel.errors import ConfigError
from .parallel_vae import run_tiled
from .vae_decode import tile_inputs


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
                *tile_inputs("encode", 64),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, vae: Any, tile_size: int, overlap: int, sp_config: SequenceParallelConfig | None = None, **inputs: Any
    ) -> io.NodeOutput:
        limit = (
            tile_size // 2 if vae.latent_dim == 2 else tile_size
        )  # pictures are also cut into tiles of half the height
        if overlap >= limit:
            raise ConfigError(f"overlap is {overlap}; allowed with tile_size {tile_size} are less than {limit}")
        inputs |= {"tile_size": tile_size, "overlap": overlap}
        return io.NodeOutput(*run_tiled("VAEEncodeTiled", vae, sp_config, cls.hidden.unique_id, **inputs))
