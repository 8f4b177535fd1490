"""The model files that the tests need: tiny models, LoRAs, and files that must be refused."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.comfyui.installation import REPOSITORY, Installation

TINY = "tiny.safetensors"
DEEP = "deep.safetensors"  # many blocks: long steps made of short parts, and weights large enough to see in memory
TRUNCATED = "truncated.safetensors"
CORRUPT_HEADER = "corrupt_header.safetensors"
FLUX = "tiny_flux.safetensors"
WAN = "tiny_wan.safetensors"
WAN_COMFY_QUANT = "wan_comfy_quant.safetensors"
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
COGVIDEOX_FOLDER = "tiny_cogvideox_diffusers"
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
H3 = "tiny_minimax_h3.safetensors"
LTX23 = "tiny_ltx_2.3.safetensors"
KREA2 = "tiny_krea_2.safetensors"
Z_IMAGE = "tiny_z_image.safetensors"
WAN_VACE = "tiny_wan_vace.safetensors"
SD35 = "tiny_sd_3.5.safetensors"
STABLE_AUDIO_3 = "tiny_stable_audio_3.safetensors"
PIXART = "tiny_pixart.safetensors"  # of a class that has no plan
SEEDVR2 = "tiny_seedvr2.safetensors"
WAN_CAUSAL = "tiny_wan_causal.safetensors"
SDXL = "tiny_sdxl.safetensors"  # a checkpoint: predicts v, as a mark beside the network says, and has a VAE
SDXL_WHOLE = "tiny_sdxl_whole.safetensors"  # a checkpoint with both text encoders, too
LTX23_WHOLE = (
    "tiny_ltx_2.3_whole.safetensors"  # with the VAEs of pictures and sound, a vocoder, and the text projection
)
LTX23_LARGE = "large_ltx_2.3.safetensors"  # with a network of 480 MiB, zeros, and the VAE of pictures
LORA = "krea_2_lora.safetensors"

# Files of the same networks in other dtypes and layouts.
HUNYUAN_VIDEO_KINDS = tuple(
    f"hunyuan_video_{kind}.safetensors"
    for kind in ("fp16", "bf16", "fp8", "scaled_0", "scaled_2", "comfy_quant", "metadata")
)
FLUX_KINDS = tuple(f"flux_{kind}.safetensors" for kind in ("bf16", "fp8", "scaled_0", "scaled_2", "comfy_quant"))
WAN_KINDS = (WAN_COMFY_QUANT,)


def write_model_files(installation: Installation, models: Path) -> None:
    """Fills a ComfyUI models folder."""
    command = [str(installation.python), "-m", "tests.comfyui.write_models", str(installation.path), str(models)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = models / "diffusion_models"
    content = (folder / TINY).read_bytes()
    (folder / TRUNCATED).write_bytes(content[: len(content) * 2 // 3])
    (folder / CORRUPT_HEADER).write_bytes(struct.pack("<Q", 64) + b"{this is no JSON".ljust(64) + bytes(64))
    scales = {"single_blocks.0.linear1.wscales": torch.zeros(1)}
    save_file(load_file(folder / FLUX) | scales, folder / SVDQUANT_LIKE)
    _write_zeros(folder / SD_LIKE, _SD_SHAPES)
    _write_zeros(folder / AURA_FLOW_LIKE, _AURA_FLOW_SHAPES)


def file_bytes(models: Path, name: str) -> int:
    return (models / "diffusion_models" / name).stat().st_size


def _write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


# Just some of the keys by which ComfyUI tells these families, with tiny shapes.
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
