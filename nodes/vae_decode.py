"""VAE Decode (Parallel): ComfyUI's VAE Decode (Tiled), its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .parallel_vae import run_tiled
from .tile_inputs import tile_inputs


class SPVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPVAEDecode",
            display_name="VAE Decode (Parallel)",
            category="sequence parallel",
            description=(
                "Decodes tiles on all devices at once. The picture is that of VAE Decode (Tiled) with the same"
                " settings, bit for bit on the same model of GPU. Smaller tiles share out better and need less"
                " memory."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="From Load VAE; the workers are sent its weights once."),
                *tile_inputs("decode", step=32),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, vae: Any, sp_config: SequenceParallelConfig | None = None, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*run_tiled("VAEDecodeTiled", vae, sp_config, **inputs))
