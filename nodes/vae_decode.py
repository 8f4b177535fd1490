"""VAE Decode (Parallel): ComfyUI's VAE Decode (Tiled), its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .parallel_vae import run_tiled
from .sp_config import SPConfig


class SPVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPVAEDecode",
            display_name="VAE Decode (Parallel)",
            category="sequence parallel",
            description=(
                "Decodes tiles on all devices at once. The picture is that of VAE Decode (Tiled) with the same"
                " settings, bit for bit. Smaller tiles share out better and need less memory."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="From Load VAE; the workers are sent its weights once."),
                io.Int.Input(
                    "tile_size", default=512, min=64, max=4096, step=32, tooltip="Height and width, in pixels."
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
                    tooltip="Video only: frames to decode at a time.",
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
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae: Any, sp_config: SequenceParallelConfig | None = None, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*run_tiled("VAEDecodeTiled", vae, sp_config, cls.hidden.unique_id, **inputs))
