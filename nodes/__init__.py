"""The pack's ComfyUI half: its nodes, one file per node, and the panel's routes."""

from pathlib import Path

import comfyui_version
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from ..parallel.comfyui import contract
from ..parallel.host import group_log
from ..parallel.versions import OLDEST_COMFYUI, OLDEST_TORCH, require

contract.changed()  # logs the differences
try:
    from . import panel
    from .first_block_cache import SPFirstBlockCache
    from .load_checkpoint import SPLoadCheckpoint
    from .load_diffusion_model import SPLoadDiffusionModel
    from .quantize_fp8 import SPQuantizeFP8
    from .sampler import SPSampler
    from .sp_config import SPConfigNode
    from .tea_cache import SPTeaCache
    from .torch_compile import SPTorchCompile
    from .vae import SPVAE
    from .vae_decode import SPVAEDecode
    from .vae_encode import SPVAEEncode
except (ImportError, AttributeError):
    contract.require()
    raise


class SequenceParallelExtension(ComfyExtension):
    async def on_load(self) -> None:
        from server import PromptServer  # only a running ComfyUI has it

        if (server := getattr(PromptServer, "instance", None)) is not None and contract.fits("panel"):
            # beside comfyui.log, in a folder that no route of ComfyUI's serves
            group_log.keep_in(Path(folder_paths.get_system_user_directory("sequence_parallel")))
            panel.register(server)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SPConfigNode,
            SPLoadDiffusionModel,
            SPLoadCheckpoint,
            SPFirstBlockCache,
            SPTeaCache,
            SPQuantizeFP8,
            SPTorchCompile,
            SPSampler,
            SPVAE,
            SPVAEDecode,
            SPVAEEncode,
        ]


async def comfy_entrypoint() -> SequenceParallelExtension:
    """Returns the extension; ComfyUI's entry point to the pack.

    Raises:
        UnsupportedError: ComfyUI or torch is too old, or ComfyUI does not fit the contract. ComfyUI logs the message
            and continues without the pack.
    """
    require("ComfyUI", comfyui_version.__version__, OLDEST_COMFYUI)
    require("torch", torch.__version__, OLDEST_TORCH)
    contract.require("nodes")
    return SequenceParallelExtension()
