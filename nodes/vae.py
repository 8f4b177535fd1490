"""VAE (Parallel): a VAE for any node, its tiles computed by all workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .parallel_vae import in_workers
from .tile_inputs import check_overlap, tile_inputs


class SPVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPVAE",
            display_name="VAE (Parallel)",
            category="sequence parallel",
            description=(
                "For nodes that encode or decode by themselves, such as image to video: this VAE cuts their images or"
                " latents into tiles, and all devices compute the tiles at once. The result is that of VAE Encode"
                " (Tiled) and VAE Decode (Tiled) with the same settings. An input that fits into one tile is computed"
                " as without this node."
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="From Load VAE; the workers are sent its weights once."),
                *tile_inputs("encode or decode", step=64, temporal_size=4096),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae: Any, sp_config: SequenceParallelConfig | None = None, **tiling: int) -> io.NodeOutput:
        check_overlap(vae, tiling["tile_size"], tiling["overlap"])
        return io.NodeOutput(in_workers(vae, sp_config, **tiling))
