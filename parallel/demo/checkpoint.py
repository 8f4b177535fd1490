"""Tiny random checkpoints in the file layouts that users have, for the demo and the tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..adapters.base import Adapter
from ..adapters.cogvideox import CogVideoXAdapter
from ..adapters.flux import FluxAdapter
from ..adapters.flux2 import Flux2Adapter
from ..adapters.hunyuan_video import HunyuanVideoAdapter
from ..adapters.hunyuan_video_15 import HunyuanVideo15Adapter
from ..adapters.ltxv import LTXVAdapter
from ..adapters.mochi import MochiAdapter
from ..adapters.qwen_image import QwenImageAdapter
from ..adapters.two_stream import HEAD_DIM
from ..adapters.wan import WanAdapter

# ComfyUI's names → Tencent's names; the opposite of the adapter's table.
_ORIGINAL = [
    (r"^(txt_in\.t_embedder|time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"^(txt_in\.t_embedder|time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"_attn\.qkv\.", "_attn_qkv."),
    (r"_attn\.proj\.", "_attn_proj."),
    (r"_attn\.norm\.query_norm\.", "_attn_q_norm."),
    (r"_attn\.norm\.key_norm\.", "_attn_k_norm."),
    (r"\.norm\.query_norm\.", ".q_norm."),
    (r"\.norm\.key_norm\.", ".k_norm."),
    (r"_mod\.lin\.", "_mod.linear."),
    (r"\.modulation\.lin\.", ".modulation.linear."),
    (r"(_mlp|\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"(_mlp|\.\d+\.mlp)\.2\.", r"\1.fc2."),
]


SCALED_LAYOUTS = ("marker_0", "marker_2", "comfy_quant", "metadata")
"""How files of scaled fp8 name their scales; `marker_N` is the older way, N the marker's count of elements."""


_UNSCALED = ("img_in", "final_layer.linear", "cond_type_embedding", "patch_embed.")


def scaled_fp8(
    tensors: dict[str, torch.Tensor], layout: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Rounds the weights of linear layers to fp8 with one scale each, but for the first and the last.

    Args:
        tensors: a whole network.
        layout: one of SCALED_LAYOUTS, or `dequantised` for the true weights of such a file, in fp32.
        dtype: the fp8 one.

    Returns:
        Tensors and metadata of the file.
    """
    if layout not in (*SCALED_LAYOUTS, "dequantised"):
        raise ValueError(f"layout is {layout!r}; allowed are {', '.join(SCALED_LAYOUTS)}, dequantised")
    found: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight") or name.startswith(_UNSCALED):
            found[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().max() / torch.finfo(dtype).max
        found[name] = (tensor / scale).to(dtype)
        if layout == "dequantised":
            found[name] = found[name].float() * scale
            continue
        new = layout in ("comfy_quant", "metadata")
        found[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale
        found[f"{layer}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(0.5)
        layers[layer] = {"format": str(dtype).removeprefix("torch.")}
        if layout == "comfy_quant":
            found[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    if layout.startswith("marker"):
        found["scaled_fp8"] = torch.empty(int(layout[-1]), dtype=dtype)
    return found, {"_quantization_metadata": json.dumps({"layers": layers})} if layout == "metadata" else {}


def tiny_config(
    *, heads: int, depth: int, depth_single: int, context_dim: int, in_channels: int, guidance: bool
) -> dict[str, Any]:
    """Configuration of a small HunyuanVideo; ComfyUI fixes the head size at 128 and the pooled text at 768."""
    return {
        "in_channels": in_channels,
        "out_channels": 16,
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_DIM,
        "num_layers": depth,
        "num_single_layers": depth_single,
        "num_refiner_layers": 2,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": guidance,
        "text_embed_dim": context_dim,
        "pooled_projection_dim": 768,
    }


def random_tensors(adapter: Adapter, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a sensible size in ComfyUI's names: N(0, 1/√fan_in), norms near 1, biases near 0.

    NumPy's RandomState stream is frozen for good, so a seed gives the same weights with every version. They are drawn
    in the order of the names, not of the table, which may change.
    """
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in sorted(adapter.native_tensors(config).items()):
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            values *= np.prod(shape[1:]) ** -0.5
        else:
            values *= 0.1
            if "norm" in name and name.endswith(".weight"):
                values += 1
        tensors[name] = torch.from_numpy(values)
    return tensors


def write_tiny_hunyuan_video(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 1,
    depth_single: int = 1,
    context_dim: int = 64,
    in_channels: int = 16,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    names: str = "comfyui",
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random HunyuanVideo of hidden size heads × 128 as a single safetensors file.

    Args:
        names: `comfyui`, or `original` for Tencent's names.
        prefix: put before every name, e.g. `model.diffusion_model.`.
        scaled: a layout of `scaled_fp8`, for a file of that kind.

    Returns:
        The model's configuration.
    """
    if names not in ("comfyui", "original"):
        raise ValueError(f"names is {names!r}; allowed are comfyui, original")
    config = tiny_config(
        heads=heads,
        depth=depth,
        depth_single=depth_single,
        context_dim=context_dim,
        in_channels=in_channels,
        guidance=guidance,
    )
    tensors = random_tensors(HunyuanVideoAdapter(), config, seed)
    if names == "original":
        tensors = {_original_name(name): tensor for name, tensor in tensors.items()}
    _save(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, prefix, scaled)
    return config


def write_tiny_hunyuan_video_15(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    context_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random HunyuanVideo 1.5 of hidden size heads × 128 as a single safetensors file; returns its
    configuration. ComfyUI's loader knows these widths of ByT5 and SigLIP only."""
    config = {
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_DIM,
        "num_layers": depth,
        "num_refiner_layers": 2,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": context_dim,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
    }
    _write(path, HunyuanVideo15Adapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_flux(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 1,
    depth_single: int = 1,
    context_dim: int = 64,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random FLUX.1 of hidden size heads × 128 as a single safetensors file; returns its configuration."""
    config = {
        "in_channels": 64,
        "out_channels": 64,
        "num_attention_heads": heads,
        "num_layers": depth,
        "num_single_layers": depth_single,
        "guidance_embeds": guidance,
        "joint_attention_dim": context_dim,
        "pooled_projection_dim": 768,
    }
    _write(path, FluxAdapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_flux2(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 1,
    depth_single: int = 1,
    context_dim: int = 64,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random FLUX.2 of hidden size heads × 128 as a single safetensors file; returns its configuration.

    ComfyUI's loader knows 128 channels of the latent only.

    Args:
        guidance: False for Klein.
    """
    config = {
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": heads,
        "num_layers": depth,
        "num_single_layers": depth_single,
        "guidance_embeds": guidance,
        "joint_attention_dim": context_dim,
    }
    _write(path, Flux2Adapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_wan(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    in_channels: int = 16,
    out_channels: int = 16,
    clip: bool = False,
    clip_positions: int | None = None,
    context_dim: int = 4096,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random Wan of hidden size heads × 128 as a single safetensors file; returns its configuration.

    Args:
        clip: with the layers for CLIP image tokens, as 2.1 image-to-video has them.
        clip_positions: tokens of the position embedding that first-and-last-frame models add to them.
        context_dim: ComfyUI's loader knows 4096 only.
        scaled: a layout of `scaled_fp8`, for a file of that kind.
    """
    config = {
        "num_attention_heads": heads,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": context_dim,
        "ffn_dim": 384,
        "num_layers": depth,
        "image_dim": 1280 if clip else None,
        "pos_embed_seq_len": clip_positions,
    }
    _write(path, WanAdapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_mochi(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    context_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random Mochi of hidden size heads × 96 as a single safetensors file; returns its configuration.

    Of these widths ComfyUI and diffusers make hidden layers of the same width. ComfyUI's loader reads no size from the
    file: it must be told of these.
    """
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 96,
        "num_layers": depth,
        "pooled_projection_dim": 96,
        "in_channels": 12,
        "out_channels": 12,
        "text_embed_dim": context_dim,
    }
    _write(path, MochiAdapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_ltxv(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    context_dim: int = 64,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random LTXV of hidden size heads × 64 as a single safetensors file; returns its configuration.

    Args:
        causal: with the positions of version 0.9.5 and newer.
    """
    hidden = heads * 64
    config = {
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "cross_attention_dim": hidden,
        "num_layers": depth,
        "caption_channels": context_dim,
        "causal_temporal_positioning": causal,
    }
    tensors = random_tensors(LTXVAdapter(), config, seed)
    _save(
        path,
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        prefix,
        scaled,
        {"config": json.dumps({"transformer": config})},
    )
    return config


def write_tiny_qwen_image(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    context_dim: int = 64,
    clean_references: bool = False,
    layered: bool = False,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random Qwen-Image of hidden size heads × 128 as a single safetensors file; returns its configuration.

    ComfyUI's loader knows 24 heads and a text of 3584 channels only: it must be told of these.

    Args:
        clean_references: with the mark of Edit 2511.
        layered: with the embedding that Layered has.
    """
    config = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": depth,
        "num_attention_heads": heads,
        "joint_attention_dim": context_dim,
        "zero_cond_t": clean_references,
        "use_additional_t_cond": layered,
    }
    _write(path, QwenImageAdapter(), config, seed, dtype, prefix, scaled)
    return config


def write_tiny_cogvideox(
    path: str | Path,
    *,
    seed: int = 0,
    heads: int = 2,
    depth: int = 2,
    in_channels: int = 16,
    frames_per_patch: int | None = None,
    ofs: bool = False,
    learned_positions: int = 0,
    context_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    scaled: str = "",
) -> dict[str, Any]:
    """Writes a random CogVideoX of hidden size heads × 64 as a single safetensors file; returns its configuration.

    Args:
        frames_per_patch: 2 for CogVideoX 1.5.
        ofs: with the embedding that 1.5 image-to-video has.
        learned_positions: tokens of video for which the file has positions; 0 makes a model with rotary ones.
        scaled: a layout of `scaled_fp8`, for a file of that kind.
    """
    config = {
        "num_attention_heads": heads,
        "in_channels": in_channels,
        "out_channels": 16,
        "time_embed_dim": 96,
        "ofs_embed_dim": 96 if ofs else None,
        "text_embed_dim": context_dim,
        "num_layers": depth,
        "patch_size": 2,
        "patch_size_t": frames_per_patch,
        "position_rows": 226 + learned_positions if learned_positions else 0,
    }
    _write(path, CogVideoXAdapter(), config, seed, dtype, prefix, scaled)
    return config


WRITERS: dict[str, Callable[..., dict[str, Any]]] = {
    HunyuanVideoAdapter.family: write_tiny_hunyuan_video,
    HunyuanVideo15Adapter.family: write_tiny_hunyuan_video_15,
    FluxAdapter.family: write_tiny_flux,
    Flux2Adapter.family: write_tiny_flux2,
    WanAdapter.family: write_tiny_wan,
    CogVideoXAdapter.family: write_tiny_cogvideox,
    MochiAdapter.family: write_tiny_mochi,
    LTXVAdapter.family: write_tiny_ltxv,
    QwenImageAdapter.family: write_tiny_qwen_image,
}
"""Family → what writes its tiny checkpoints; all take `path`, `seed`, `heads`, `depth`, `dtype`, `prefix`, `scaled`."""


def _write(
    path: str | Path, adapter: Adapter, config: dict[str, Any], seed: int, dtype: torch.dtype, prefix: str, scaled: str
) -> None:
    """A file of random tensors for this configuration."""
    tensors = random_tensors(adapter, config, seed)
    _save(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, prefix, scaled)


def _save(
    path: str | Path,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    scaled: str,
    metadata: dict[str, str] | None = None,
) -> None:
    tensors, of_scales = scaled_fp8(tensors, scaled) if scaled else (tensors, {})
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, str(path), of_scales | (metadata or {}))


def _original_name(name: str) -> str:
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name
