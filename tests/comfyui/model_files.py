"""The model files that the tests need: tiny checkpoints, LoRAs, and files that must be refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.comfyui.lora_files import write_lora_files

TINY = "tiny.safetensors"
DEEP = "deep.safetensors"  # many blocks: long steps made of short parts, and weights large enough to see in memory
TRUNCATED = "truncated.safetensors"
CORRUPT_HEADER = "corrupt_header.safetensors"
FLUX = "tiny_flux.safetensors"
FLUX_FOLDER = "tiny_flux_diffusers"  # the same weights as a diffusers transformer folder
SD_LIKE = "sd_like.safetensors"
AURA_FLOW_LIKE = "aura_flow_like.safetensors"
ORIGINAL_NAMES = "original_names.safetensors"  # Tencent's own parameter names, with the prefix of full checkpoints
NO_GUIDANCE = "no_guidance.safetensors"


def write_model_files(models: Path) -> None:
    """Fill a ComfyUI models folder."""
    from parallel.demo.checkpoint import write_tiny_flux, write_tiny_hunyuan_video

    folder = models / "diffusion_models"
    write_tiny_hunyuan_video(folder / TINY)
    write_tiny_hunyuan_video(folder / DEEP, seed=1, depth=8, depth_single=24)
    write_tiny_hunyuan_video(folder / ORIGINAL_NAMES, seed=2, names="original", prefix="model.diffusion_model.")
    write_tiny_hunyuan_video(folder / NO_GUIDANCE, seed=3, guidance=False)
    content = (folder / TINY).read_bytes()
    (folder / TRUNCATED).write_bytes(content[: len(content) * 2 // 3])
    (folder / CORRUPT_HEADER).write_bytes(struct.pack("<Q", 64) + b"{this is no JSON".ljust(64) + bytes(64))
    write_tiny_flux(folder / FLUX)
    _write_diffusers_folder(folder / FLUX, folder / FLUX_FOLDER)
    _write_zeros(folder / SD_LIKE, _SD_SHAPES)
    _write_zeros(folder / AURA_FLOW_LIKE, _AURA_FLOW_SHAPES)
    write_lora_files(models / "loras")


def file_bytes(models: Path, name: str) -> int:
    return (models / "diffusion_models" / name).stat().st_size


def _write_diffusers_folder(checkpoint: Path, folder: Path) -> None:
    from parallel.worker.resident import ResidentModel

    recipe = {"path": str(checkpoint), "weight_dtype": "float32", "compute_dtype": "float32"}
    model: Any = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model
    model.save_pretrained(folder)


def _write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


# Just the keys by which ComfyUI tells these families, with tiny shapes. It recognises the last one.
_SD_SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
    "model.diffusion_model.input_blocks.0.0.bias": (32,),
    "model.diffusion_model.time_embed.0.weight": (128, 32),
    "model.diffusion_model.middle_block.1.proj_in.weight": (32, 32, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 32, 3, 3),
}
_AURA_FLOW_SHAPES = {
    "cond_seq_linear.weight": (64, 32),
    "positional_encoding": (1, 16, 64),
    "register_tokens": (1, 8, 64),
    "double_layers.0.attn.w1q.weight": (64, 64),
    "single_layers.0.attn.w1q.weight": (64, 64),
}
