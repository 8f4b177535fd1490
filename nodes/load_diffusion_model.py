"""Load Diffusion Model (SP): ComfyUI's own loader, with the network in the workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..parallel.config import SequenceParallelConfig
from .native_model import WEIGHT_DTYPES, load_native_model
from .settings import default_config, read
from .sp_config import SPConfig

_FOLDER = "diffusion_models"


class SPLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLoadDiffusionModel",
            display_name="Load Diffusion Model (SP)",
            category="sequence parallel",
            description=(
                "Loads a diffusion model whose every step runs on all devices of SP Config at once. Use it in place"
                " of Load Diffusion Model; the rest of the graph stays as it is. Weights are read at the first"
                " sampling, by worker processes that stay for the next prompt."
            ),
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=[*folder_paths.get_filename_list(_FOLDER), *_diffusers_folders()],
                    tooltip="A checkpoint in models/diffusion_models, or a diffusers transformer folder there.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="As in Load Diffusion Model. fp8_e4m3fn and fp8_e5m2 halve the weights' memory.",
                    advanced=True,
                ),
                SPConfig.Input(
                    "sp_config",
                    optional=True,
                    tooltip="Devices and degrees. Without it: every GPU, or those of the setting Default devices.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, sp_config: SequenceParallelConfig | None = None
    ) -> io.NodeOutput:
        model = load_native_model(_full_path(unet_name), weight_dtype, sp_config or default_config())
        return io.NodeOutput(model)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Another setting of the default devices is another MODEL, though no input has changed."""
        return read().devices


def _diffusers_folders() -> list[str]:
    """Sub-folders of models/diffusion_models that hold a diffusers transformer."""
    found = set()
    for root in folder_paths.get_folder_paths(_FOLDER):
        for config in Path(root).glob("**/config.json"):
            try:
                if "_class_name" in json.loads(config.read_text()):
                    found.add(config.parent.relative_to(root).as_posix())
            except (OSError, ValueError):
                continue
    return sorted(found)


def _full_path(unet_name: str) -> str:
    for root in folder_paths.get_folder_paths(_FOLDER):
        folder = Path(root) / unet_name
        if (folder / "config.json").is_file():
            return str(folder)
    return folder_paths.get_full_path_or_raise(_FOLDER, unet_name)
