"""Load Checkpoint (SP): ComfyUI's own loader, with the diffusion network in the workers."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .native_model import load_native_checkpoint
from .settings import default_config, default_devices
from .sp_config import SPConfig

_FOLDER = "checkpoints"


class SPLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLoadCheckpoint",
            display_name="Load Checkpoint (SP)",
            category="sequence parallel",
            description=(
                "Loads a checkpoint whose diffusion model runs on all devices of SP Config at once. Use it in place of"
                " Load Checkpoint: CLIP and VAE are the same, and stay in ComfyUI. Weights of the diffusion model are"
                " read at the first sampling, by worker processes that stay for the next prompt."
            ),
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A safetensors file in models/checkpoints.",
                ),
                SPConfig.Input(
                    "sp_config",
                    optional=True,
                    tooltip="Devices and degrees. Without it: every GPU, or those of the setting Default devices.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, in the workers."),
                io.Clip.Output(tooltip="The text encoder, as Load Checkpoint gives it; none if the file has none."),
                io.Vae.Output(tooltip="The VAE, as Load Checkpoint gives it. VAE (Parallel) runs it in the workers."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str, sp_config: SequenceParallelConfig | None = None) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(_FOLDER, ckpt_name)
        return io.NodeOutput(*load_native_checkpoint(path, sp_config or default_config()))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Returns the default devices: if the setting changes, so does the MODEL, though no input has changed."""
        return default_devices(inputs)
