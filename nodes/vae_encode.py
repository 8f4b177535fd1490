"""VAE Encode (Parallel): ComfyUI's VAE Encode (Tiled), its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .parallel_vae import run_tiled
from .tile_inputs import check_overlap, tile_inputs


class SPVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPVAEEncode",
            display_name="VAE Encode (Parallel)",
            category="sequence parallel",
            description=(
                "Encodes tiles on all devices at once. The latent is that of VAE Encode (Tiled) with the same"
                " settings, bit for bit on the same model of GPU."
            ),
            inputs=[
                io.Image.Input("pixels", tooltip="Pictures, or the frames of one video."),
                io.Vae.Input("vae", tooltip="From Load VAE; the workers are sent its weights once."),
                *tile_inputs("encode", step=64),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, vae: Any, tile_size: int, overlap: int, sp_config: SequenceParallelConfig | None = None, **inputs: Any
    ) -> io.NodeOutput:
        check_overlap(vae, tile_size, overlap)
        inputs |= {"tile_size": tile_size, "overlap": overlap}
        return io.NodeOutput(*run_tiled("VAEEncodeTiled", vae, sp_config, **inputs))
