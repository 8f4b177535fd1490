"""The model files that the tests need: tiny checkpoints, LoRAs, and files that must be refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.lora_files import write_lora_files

TINY = "tiny.safetensors"
DEEP = "deep.safetensors"  # many blocks: long steps made of short parts, and weights large enough to see in memory
TRUNCATED = "truncated.safetensors"
CORRUPT_HEADER = "corrupt_header.safetensors"
FLUX = "tiny_flux.safetensors"
WAN = "tiny_wan.safetensors"
WAN_I2V = "tiny_wan_i2v.safetensors"  # 2.1: with CLIP's image tokens
WAN_22_I2V = "tiny_wan_22_i2v.safetensors"
WAN_22_5B = "tiny_wan_22_5b.safetensors"
HUNYUAN_15 = "tiny_hunyuan_15.safetensors"
COGVIDEOX = "tiny_cogvideox.safetensors"
COGVIDEOX_I2V = "tiny_cogvideox_i2v.safetensors"
COGVIDEOX_15_I2V = "tiny_cogvideox_15_i2v.safetensors"
COGVIDEOX_SCALED = "tiny_cogvideox_comfy_quant.safetensors"
COGVIDEOX_LEARNED = "tiny_cogvideox_learned_positions.safetensors"
HUNYUAN_15_SCALED = "tiny_hunyuan_15_comfy_quant.safetensors"
FLUX_FOLDER = "tiny_flux_diffusers"  # the same weights as a diffusers transformer folder
SD_LIKE = "sd_like.safetensors"
AURA_FLOW_LIKE = "aura_flow_like.safetensors"
ORIGINAL_NAMES = "original_names.safetensors"  # Tencent's own parameter names, with the prefix of full checkpoints
IMAGE_TO_VIDEO = "image_to_video.safetensors"  # 33 channels: the kind that concatenates a picture
NO_GUIDANCE = "no_guidance.safetensors"
SVDQUANT_LIKE = "svdquant_like.safetensors"
MOCHI = "tiny_mochi.safetensors"
LTXV = "tiny_ltxv.safetensors"
LTXV_CAUSAL = "tiny_ltxv_causal.safetensors"  # as version 0.9.5 and newer
QWEN_IMAGE = "tiny_qwen_image.safetensors"
QWEN_IMAGE_2511 = "tiny_qwen_image_2511.safetensors"
FLUX2 = "tiny_flux2.safetensors"
FLUX2_KLEIN = "tiny_flux2_klein.safetensors"  # scaled fp8

HUNYUAN_VIDEO_KINDS: dict[str, dict[str, Any]] = {
    "hunyuan_video_fp16.safetensors": {"dtype": torch.float16},
    "hunyuan_video_bf16.safetensors": {"dtype": torch.bfloat16},
    "hunyuan_video_fp8.safetensors": {"dtype": torch.float8_e4m3fn},
    "hunyuan_video_scaled_0.safetensors": {"scaled": "marker_0", "dtype": torch.bfloat16},
    "hunyuan_video_scaled_2.safetensors": {
        "scaled": "marker_2",
        "names": "original",
        "prefix": "model.diffusion_model.",
    },
    "hunyuan_video_comfy_quant.safetensors": {"scaled": "comfy_quant"},
    "hunyuan_video_metadata.safetensors": {"scaled": "metadata"},
}
FLUX_KINDS: dict[str, dict[str, Any]] = {
    "flux_bf16.safetensors": {"dtype": torch.bfloat16, "prefix": "model.diffusion_model."},
    "flux_fp8.safetensors": {"dtype": torch.float8_e4m3fn},
    "flux_scaled_0.safetensors": {"scaled": "marker_0", "prefix": "model.diffusion_model."},
    "flux_scaled_2.safetensors": {"scaled": "marker_2", "dtype": torch.float16},
    "flux_comfy_quant.safetensors": {"scaled": "comfy_quant", "dtype": torch.bfloat16},
}
WAN_KINDS: dict[str, dict[str, Any]] = {"wan_comfy_quant.safetensors": {"scaled": "comfy_quant"}}
"""Files of the same networks in other dtypes and layouts: name → how it is written."""


def write_model_files(models: Path) -> None:
    """Fill a ComfyUI models folder."""
    from parallel.demo.checkpoint import (
        write_tiny_cogvideox,
        write_tiny_flux,
        write_tiny_flux2,
        write_tiny_hunyuan_video,
        write_tiny_hunyuan_video_15,
        write_tiny_ltxv,
        write_tiny_mochi,
        write_tiny_qwen_image,
        write_tiny_wan,
    )

    folder = models / "diffusion_models"
    write_tiny_hunyuan_video(folder / TINY)
    write_tiny_hunyuan_video(folder / DEEP, seed=1, depth=8, depth_single=24)
    write_tiny_hunyuan_video(folder / ORIGINAL_NAMES, seed=2, names="original", prefix="model.diffusion_model.")
    write_tiny_hunyuan_video(folder / NO_GUIDANCE, seed=3, guidance=False)
    write_tiny_hunyuan_video(folder / IMAGE_TO_VIDEO, seed=4, in_channels=33)
    content = (folder / TINY).read_bytes()
    (folder / TRUNCATED).write_bytes(content[: len(content) * 2 // 3])
    (folder / CORRUPT_HEADER).write_bytes(struct.pack("<Q", 64) + b"{this is no JSON".ljust(64) + bytes(64))
    write_tiny_flux(folder / FLUX)
    for name, options in HUNYUAN_VIDEO_KINDS.items():
        write_tiny_hunyuan_video(folder / name, **options)
    for name, options in FLUX_KINDS.items():
        write_tiny_flux(folder / name, **options)
    scales = {"single_blocks.0.linear1.wscales": torch.zeros(1)}
    save_file(load_file(folder / FLUX) | scales, folder / SVDQUANT_LIKE)
    write_tiny_wan(folder / WAN, prefix="model.diffusion_model.")
    for name, options in WAN_KINDS.items():
        write_tiny_wan(folder / name, **options)
    write_tiny_wan(folder / WAN_I2V, seed=1, in_channels=36, clip=True)
    write_tiny_wan(folder / WAN_22_I2V, seed=2, in_channels=36)
    write_tiny_wan(folder / WAN_22_5B, seed=3, in_channels=48, out_channels=48)
    write_tiny_hunyuan_video_15(folder / HUNYUAN_15, prefix="model.diffusion_model.")
    write_tiny_hunyuan_video_15(folder / HUNYUAN_15_SCALED, scaled="comfy_quant")
    write_tiny_cogvideox(folder / COGVIDEOX)
    write_tiny_cogvideox(folder / COGVIDEOX_I2V, in_channels=32, prefix="model.diffusion_model.")
    write_tiny_cogvideox(folder / COGVIDEOX_15_I2V, frames_per_patch=2, in_channels=32, ofs=True)
    write_tiny_cogvideox(folder / COGVIDEOX_SCALED, scaled="comfy_quant")
    write_tiny_cogvideox(folder / COGVIDEOX_LEARNED, heads=3, learned_positions=17550)
    write_tiny_mochi(folder / MOCHI)
    write_tiny_ltxv(folder / LTXV, prefix="model.diffusion_model.", scaled="comfy_quant")
    write_tiny_ltxv(folder / LTXV_CAUSAL, seed=1, heads=3, causal=True)
    write_tiny_qwen_image(folder / QWEN_IMAGE)
    write_tiny_qwen_image(folder / QWEN_IMAGE_2511, seed=1, clean_references=True)
    write_tiny_flux2(folder / FLUX2, prefix="model.diffusion_model.")
    write_tiny_flux2(folder / FLUX2_KLEIN, seed=1, guidance=False, scaled="comfy_quant")
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
