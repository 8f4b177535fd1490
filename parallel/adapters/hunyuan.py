"""What HunyuanVideo and HunyuanVideo 1.5 share: names of tensors, texts with padding, the token refiner, positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..attention.rope import Rope, rope
from ..errors import UnsupportedError
from . import two_stream
from .inputs import alike
from .patches import Grid
from .two_stream import HEAD_DIM, Shapes

ROPE_AXES = (16, 56, 56)
ROPE_THETA = 256.0

# Values of a diffusers config.json that the mathematics here takes for granted.
FIXED = {
    "attention_head_dim": HEAD_DIM,
    "qk_norm": "rms_norm",
    "rope_theta": ROPE_THETA,
    "rope_axes_dim": list(ROPE_AXES),
}

# Tencent's names → ComfyUI's names (the same table as ComfyUI's own loader, by meaning).
TENCENT = [
    (r"^(txt_in\.t_embedder|time_in|time_r_in|guidance_in|vector_in)\.mlp\.0\.", r"\1.in_layer."),
    (r"^(txt_in\.t_embedder|time_in|time_r_in|guidance_in|vector_in)\.mlp\.2\.", r"\1.out_layer."),
    (r"^txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
    (r"^txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
    (r"_attn_qkv\.", "_attn.qkv."),
    (r"_attn_proj\.", "_attn.proj."),
    (r"_attn_q_norm\.", "_attn.norm.query_norm."),
    (r"_attn_k_norm\.", "_attn.norm.key_norm."),
    (r"\.q_norm\.", ".norm.query_norm."),
    (r"\.k_norm\.", ".norm.key_norm."),
    (r"_mod\.linear\.", "_mod.lin."),
    (r"\.modulation\.linear\.", ".modulation.lin."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.2."),
    (r"\.scale$", ".weight"),
]

# ComfyUI's names → diffusers' names.
RENAMED = [
    (r"^img_in\.proj$", "x_embedder.proj"),
    (r"^txt_in\.input_embedder$", "context_embedder.proj_in"),
    (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"^txt_in\.individual_token_refiner\.blocks\.(\d+)\.", r"context_embedder.token_refiner.refiner_blocks.\1."),
    (r"\.adaLN_modulation\.1$", ".norm_out.linear"),
    (r"\.self_attn\.proj$", ".attn.to_out.0"),
    (r"\.mlp\.0$", ".ff.net.0.proj"),
    (r"\.mlp\.2$", ".ff.net.2"),
    *two_stream.RENAMED,
]


def native_tensors(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of what both families have."""
    d, text = config["num_attention_heads"] * HEAD_DIM, config["text_embed_dim"]
    patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
    linear, rms_norms = two_stream.block_tensors(config)
    linear |= {
        "txt_in.input_embedder": (d, text),
        "txt_in.c_embedder.in_layer": (d, text),
        "txt_in.c_embedder.out_layer": (d, d),
        "txt_in.t_embedder.in_layer": (d, 256),
        "txt_in.t_embedder.out_layer": (d, d),
        "final_layer.linear": (config["out_channels"] * prod(patch), d),
    }
    layer_norms: Shapes = {}
    for i in range(config["num_refiner_layers"]):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        linear |= {f"{block}.self_attn.qkv": (3 * d, d), f"{block}.self_attn.proj": (d, d)}
        linear |= {f"{block}.mlp.0": (4 * d, d), f"{block}.mlp.2": (d, 4 * d)}
        linear[f"{block}.adaLN_modulation.1"] = (2 * d, d)
        layer_norms |= {f"{block}.norm1": (d,), f"{block}.norm2": (d,)}
    return {
        "img_in.proj.weight": (d, config["in_channels"], *patch),
        "img_in.proj.bias": (d,),
        **two_stream.with_biases(linear | layer_norms),
        **{f"{name}.weight": (size,) for name, size in rms_norms.items()},
    }


def check_video(name: str, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
    """Checks the inputs that both families have; returns the number of the latent's tokens.

    Raises:
        UnsupportedError: one is missing or does not fit; `name` is the family's for the user.
    """
    if "context" not in inputs:
        raise UnsupportedError(f"{name} needs a text encoder's conditioning ('context'); the conditioning has none")
    x, context = tuple(inputs["x"].shape), tuple(inputs["context"].shape)
    if len(x) != 5 or x[1] != config["in_channels"]:
        raise UnsupportedError(
            f"{name} needs a latent of shape [batch, {config['in_channels']}, frames, height, width]"
            f" (with image channels, if any); it is {list(x)}"
        )
    patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
    for axis, size, step in zip(("frames", "height", "width"), x[2:], patch, strict=True):
        if size % step:
            raise UnsupportedError(f"latent {axis} is {size}; {name} needs a multiple of {step}")
    if len(context) != 3 or context[2] != config["text_embed_dim"]:
        raise UnsupportedError(
            f"the text conditioning has the shape {list(context)}; this checkpoint needs"
            f" [batch, tokens, {config['text_embed_dim']}]: is it from {name}'s text encoder?"
        )
    if (mask := inputs.get("attention_mask")) is not None:
        if mask.is_floating_point():
            raise UnsupportedError(f"attention_mask is floating-point; {name} (SP) needs an integer 0/1 mask")
        if mask.shape != (mask.shape[0], context[1]):
            raise UnsupportedError(f"attention_mask has the shape {list(mask.shape)}; the text is {list(context)}")
    if inputs["timestep"].ndim != 1:
        raise UnsupportedError(f"{name} needs one timestep per sample; got {list(inputs['timestep'].shape)}")
    return prod(size // step for size, step in zip(x[2:], patch, strict=True))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Samples of a batch that can run together: their texts have the same valid length."""

    rows: slice
    """The samples' places in the batch."""
    text: Tensor
    """[b, L, C], valid tokens only."""
    places: list[int]
    """Of these tokens in the text with its padding."""
    padded: int
    """Tokens of that text."""
    text_mean: Tensor
    """[b, C]: mean over all tokens, padding included, as ComfyUI takes it."""
    others: Mapping[str, Tensor]
    """Their other conditioning: [b, …], or [1, …] for all of them."""


def by_length(conditioning: Mapping[str, Tensor]) -> list[Prompts]:
    """The samples, grouped by which tokens of their texts are no padding."""
    context, mask = conditioning["context"], conditioning.get("attention_mask")
    wide = context.float() if context.dtype == torch.float16 else context
    mean = (wide.sum(dim=1) / context.shape[1]).to(context.dtype)
    others = {name: value for name, value in conditioning.items() if name not in ("context", "attention_mask")}

    def prompts(rows: slice, keep: Tensor) -> Prompts:
        return Prompts(
            rows=rows,
            text=context[rows, keep],
            places=keep.nonzero().flatten().tolist(),
            padded=context.shape[1],
            text_mean=mean[rows],
            others={name: value if len(value) == 1 else value[rows] for name, value in others.items()},
        )

    return [prompts(rows, keep) for rows, keep in alike(context, mask)]


def refined_text(m: Any, timestep: Tensor, prompts: Prompts) -> Tensor:
    """[B, L, hidden]: small, so every rank refines the whole text and then takes its rows."""
    refiner = m.context_embedder
    temb = refiner.time_text_embed(timestep, prompts.text_mean)
    hidden = refiner.proj_in(prompts.text)
    return refiner.token_refiner(hidden, temb, None) if hidden.shape[1] else hidden


def positions(start: int, stop: int, grid: Grid, device: torch.device) -> Rope:
    """For video tokens [start, stop)."""
    _, height, width = grid
    index = torch.arange(start, stop, device=device)
    return rope((index // (height * width), index // width % height, index % width), ROPE_AXES, ROPE_THETA)
