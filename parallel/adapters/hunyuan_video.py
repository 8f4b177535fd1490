"""HunyuanVideo (https://arxiv.org/abs/2412.03603): joint attention of video and text, dual- then single-stream blocks.

The mathematics is ComfyUI's, on diffusers' modules. Both streams are split over the ranks, so the block functions here
take this rank's video rows and text rows (possibly none) instead of diffusers' slicing by text length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rope, rotate
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from .base import Adapter, Piece, StepContext
from .patches import Grid, read_tokens, write_tokens

HEAD_DIM = 128
ROPE_AXES = (16, 56, 56)
ROPE_THETA = 256.0

# Values that a diffusers config.json may leave out.
_DEFAULTS = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": HEAD_DIM, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip

_MARKERS = ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight", "vector_in.in_layer.weight")
_OTHER_FAMILIES = (
    "cond_type_embedding.weight",
    "byt5_in.fc1.weight",
    "vision_in.proj.0.weight",
    "time_r_in.in_layer.weight",
)

# Tencent's names → ComfyUI's names (the same table as ComfyUI's own loader, by meaning).
_TENCENT = [
    (r"^(txt_in\.t_embedder|time_in|guidance_in|vector_in)\.mlp\.0\.", r"\1.in_layer."),
    (r"^(txt_in\.t_embedder|time_in|guidance_in|vector_in)\.mlp\.2\.", r"\1.out_layer."),
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

# ComfyUI's names → diffusers' names, for tensors that keep their shape.
_RENAMED = [
    (r"^img_in\.proj$", "x_embedder.proj"),
    (r"^time_in\.", "time_text_embed.timestep_embedder."),
    (r"^vector_in\.", "time_text_embed.text_embedder."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"^txt_in\.input_embedder$", "context_embedder.proj_in"),
    (r"^txt_in\.t_embedder\.", "context_embedder.time_text_embed.timestep_embedder."),
    (r"^txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
    (r"^txt_in\.individual_token_refiner\.blocks\.(\d+)\.", r"context_embedder.token_refiner.refiner_blocks.\1."),
    (r"^final_layer\.linear$", "proj_out"),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"\.in_layer$", ".linear_1"),
    (r"\.out_layer$", ".linear_2"),
    (r"\.adaLN_modulation\.1$", ".norm_out.linear"),
    (r"\.self_attn\.proj$", ".attn.to_out.0"),
    (r"\.img_mod\.lin$", ".norm1.linear"),
    (r"\.txt_mod\.lin$", ".norm1_context.linear"),
    (r"\.img_attn\.norm\.query_norm$", ".attn.norm_q"),
    (r"\.img_attn\.norm\.key_norm$", ".attn.norm_k"),
    (r"\.txt_attn\.norm\.query_norm$", ".attn.norm_added_q"),
    (r"\.txt_attn\.norm\.key_norm$", ".attn.norm_added_k"),
    (r"\.img_attn\.proj$", ".attn.to_out.0"),
    (r"\.txt_attn\.proj$", ".attn.to_add_out"),
    (r"\.modulation\.lin$", ".norm.linear"),
    (r"\.norm\.query_norm$", ".attn.norm_q"),
    (r"\.norm\.key_norm$", ".attn.norm_k"),
    (r"\.linear2$", ".proj_out"),
    (r"\.img_mlp\.0$", ".ff.net.0.proj"),
    (r"\.img_mlp\.2$", ".ff.net.2"),
    (r"\.txt_mlp\.0$", ".ff_context.net.0.proj"),
    (r"\.txt_mlp\.2$", ".ff_context.net.2"),
    (r"\.mlp\.0$", ".ff.net.0.proj"),
    (r"\.mlp\.2$", ".ff.net.2"),
]

# Fused projections and the parameters that their thirds become.
_FUSED_QKV = {
    ".img_attn.qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
    ".txt_attn.qkv": (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"),
    ".self_attn.qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
}


def _rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _rows(start: int, stop: int):
    return lambda tensor: tensor[start:stop]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Samples of a batch that can run together: their texts have the same valid length."""

    rows: slice
    """The samples' places in the batch."""
    text: Tensor
    """[b, L, C], valid tokens only."""
    text_mean: Tensor
    """[b, C]: mean over all tokens, padding included, as ComfyUI takes it."""
    pooled: Tensor
    guidance: Tensor | None


class HunyuanVideoAdapter(Adapter):
    family: ClassVar[str] = "hunyuan_video"
    repeated_blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        names = {_rename(name, _TENCENT) for name in tensors}
        return all(marker in names for marker in _MARKERS) and not any(other in names for other in _OTHER_FAMILIES)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "HunyuanVideoTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            if config.get("image_condition_type") == "token_replace":
                raise UnsupportedError(f"{source.path}: the token-replace image-to-video variant is not supported yet")
            return config
        shapes = {_rename(name, _TENCENT): info.shape for name, info in source.tensors.items()}
        try:
            hidden, in_channels, *patch = shapes["img_in.proj.weight"]
            patch_t, patch_h, _ = patch
            return {
                "in_channels": in_channels,
                "out_channels": shapes["final_layer.linear.weight"][0] // prod(patch),
                "num_attention_heads": hidden // HEAD_DIM,
                "attention_head_dim": HEAD_DIM,
                "num_layers": _count(shapes, "double_blocks"),
                "num_single_layers": _count(shapes, "single_blocks"),
                "num_refiner_layers": _count(shapes, "txt_in.individual_token_refiner.blocks"),
                "patch_size": patch_h,
                "patch_size_t": patch_t,
                "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
                "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
                "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like HunyuanVideo, but is incomplete: {error}") from error

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel(**config)

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        stem, _, leaf = _rename(name, _TENCENT).rpartition(".")
        if stem == "final_layer.adaLN_modulation.1":  # (shift, scale) → (scale, shift)
            half = shape[0] // 2
            return [Piece(f"norm_out.linear.{leaf}", lambda tensor: torch.cat([tensor[half:], tensor[:half]]))]
        for fused, parts in _FUSED_QKV.items():
            if stem.endswith(fused):
                base = _rename(stem.removesuffix(fused) + ".", _RENAMED).removesuffix(".")
                third = shape[0] // 3
                return [Piece(f"{base}{p}.{leaf}", _rows(i * third, (i + 1) * third)) for i, p in enumerate(parts)]
        if stem.endswith(".linear1"):  # q, k, v and the first half of the MLP in one projection
            base = _rename(stem.removesuffix(".linear1") + ".", _RENAMED).removesuffix(".")
            hidden = config["num_attention_heads"] * config["attention_head_dim"]
            parts = (".attn.to_q", ".attn.to_k", ".attn.to_v")
            pieces = [Piece(f"{base}{p}.{leaf}", _rows(i * hidden, (i + 1) * hidden)) for i, p in enumerate(parts)]
            return [*pieces, Piece(f"{base}.proj_mlp.{leaf}", _rows(3 * hidden, shape[0]))]
        return [Piece(f"{_rename(stem, _RENAMED)}.{leaf}")]

    def native_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        d, mlp = heads * head_dim, int(heads * head_dim * config.get("mlp_ratio", 4.0))
        patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        text = config["text_embed_dim"]
        linear: dict[str, tuple[int, ...]] = {
            "txt_in.input_embedder": (d, text),
            "txt_in.c_embedder.in_layer": (d, text),
            "txt_in.c_embedder.out_layer": (d, d),
            "vector_in.in_layer": (d, config["pooled_projection_dim"]),
            "vector_in.out_layer": (d, d),
            "final_layer.linear": (config["out_channels"] * prod(patch), d),
            "final_layer.adaLN_modulation.1": (2 * d, d),
        }
        for embedder in ("time_in", "txt_in.t_embedder", *(["guidance_in"] if config["guidance_embeds"] else [])):
            linear[f"{embedder}.in_layer"] = (d, 256)
            linear[f"{embedder}.out_layer"] = (d, d)
        norms: dict[str, int] = {}
        for i in range(config["num_refiner_layers"]):
            block = f"txt_in.individual_token_refiner.blocks.{i}"
            linear |= {f"{block}.self_attn.qkv": (3 * d, d), f"{block}.self_attn.proj": (d, d)}
            linear |= {f"{block}.mlp.0": (4 * d, d), f"{block}.mlp.2": (d, 4 * d)}
            linear[f"{block}.adaLN_modulation.1"] = (2 * d, d)
            norms |= {f"{block}.norm1": d, f"{block}.norm2": d}
        for i in range(config["num_layers"]):
            for stream in ("img", "txt"):
                block = f"double_blocks.{i}.{stream}"
                linear |= {f"{block}_attn.qkv": (3 * d, d), f"{block}_attn.proj": (d, d)}
                linear |= {f"{block}_mlp.0": (mlp, d), f"{block}_mlp.2": (d, mlp), f"{block}_mod.lin": (6 * d, d)}
                norms |= {f"{block}_attn.norm.query_norm": head_dim, f"{block}_attn.norm.key_norm": head_dim}
        for i in range(config["num_single_layers"]):
            block = f"single_blocks.{i}"
            linear |= {f"{block}.linear1": (3 * d + mlp, d), f"{block}.linear2": (d, d + mlp)}
            linear[f"{block}.modulation.lin"] = (3 * d, d)
            norms |= {f"{block}.norm.query_norm": head_dim, f"{block}.norm.key_norm": head_dim}
        tensors: dict[str, tuple[int, ...]] = {
            "img_in.proj.weight": (d, config["in_channels"], *patch),
            "img_in.proj.bias": (d,),
        }
        for name, shape in linear.items():
            tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for name, size in norms.items():
            tensors[f"{name}.weight"] = (size,)
            if name.startswith("txt_in."):  # LayerNorm; the query and key norms are RMSNorm, without bias
                tensors[f"{name}.bias"] = (size,)
        return tensors

    # --- inputs -------------------------------------------------------------------------------------------------

    def check_inputs(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
        known = {"x", "timestep", "context", "y", "guidance", "attention_mask"}
        if unknown := sorted(set(shapes) - known):
            raise UnsupportedError(f"HunyuanVideo (SP) cannot use the input {', '.join(unknown)} yet")
        for name, node in (("context", "a text encoder's conditioning"), ("y", "the pooled output of CLIP-L")):
            if name not in shapes:
                raise UnsupportedError(f"HunyuanVideo needs {node} ({name!r}); the conditioning has none")
        x, context = shapes["x"], shapes["context"]
        if len(x) != 5 or x[1] != config["in_channels"]:
            raise UnsupportedError(
                f"HunyuanVideo needs a latent of shape [batch, {config['in_channels']}, frames, height, width]"
                f" (with image channels, if any); it is {list(x)}"
            )
        patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        for axis, size, step in zip(("frames", "height", "width"), x[2:], patch, strict=True):
            if size % step:
                raise UnsupportedError(f"latent {axis} is {size}; HunyuanVideo needs a multiple of {step}")
        if len(context) != 3 or context[2] != config["text_embed_dim"]:
            raise UnsupportedError(
                f"the text conditioning has the shape {list(context)}; this checkpoint needs"
                f" [batch, tokens, {config['text_embed_dim']}]: is it from HunyuanVideo's text encoder?"
            )
        if len(shapes["timestep"]) != 1:
            raise UnsupportedError(f"HunyuanVideo needs one timestep per sample; got {list(shapes['timestep'])}")
        return prod(size // step for size, step in zip(x[2:], patch, strict=True))

    def prepare(self, conditioning: Mapping[str, Tensor]) -> list[_Prompts]:
        context, mask = conditioning["context"], conditioning.get("attention_mask")
        wide = context.float() if context.dtype == torch.float16 else context
        mean = (wide.sum(dim=1) / context.shape[1]).to(context.dtype)
        guidance = conditioning.get("guidance")
        if mask is not None and mask.is_floating_point():
            raise UnsupportedError("attention_mask is floating-point; HunyuanVideo (SP) needs an integer 0/1 mask")
        if mask is None:
            return [_Prompts(slice(None), context, mean, conditioning["y"], guidance)]
        valid = mask.expand(context.shape[0], -1) != 0
        if len(set(valid.sum(dim=1).tolist())) == 1:
            text = torch.stack([row[keep] for row, keep in zip(context, valid, strict=True)])
            return [_Prompts(slice(None), text, mean, conditioning["y"], guidance)]
        prompts = []
        for i, keep in enumerate(valid):  # unequal texts: one pass per sample, so that none attends to padding
            row = slice(i, i + 1)
            trimmed = context[row, keep]
            one = guidance if guidance is None or len(guidance) == 1 else guidance[row]
            prompts.append(_Prompts(row, trimmed, mean[row], conditioning["y"][row], one))
        return prompts

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        patch = config["patch_size"]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        return {
            "x": random(1, config["in_channels"], config["patch_size_t"], 2 * patch, (world_size + 1) * patch),
            "timestep": torch.tensor([500.0]),
            "context": random(1, 7, config["text_embed_dim"]),
            "y": random(1, config["pooled_projection_dim"]),
            "guidance": torch.tensor([6.0]).to(dtype),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        }

    # --- one step -----------------------------------------------------------------------------------------------

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        for prompts in prepared:
            rows = prompts.rows
            self._step(model, x[rows], timestep[rows], prompts, out[rows], context)

    def _step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prompts: _Prompts, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        config, device = m.config, prompts.text.device
        patch: Grid = (config.patch_size_t, config.patch_size, config.patch_size)
        grid: Grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))  # type: ignore[assignment]
        plan = context.plan((prod(grid), prompts.text.shape[1]), config.num_attention_heads)
        attend = context.attention(plan)
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        temb = _modulation(m, timestep, prompts)
        text = _refined_text(m, timestep, prompts)[:, t0:t1]
        weight = m.x_embedder.proj.weight.flatten(1)
        parts = [part.to(device, weight.dtype) for part in read_tokens(x, v0, v1, patch)]
        tokens = torch.cat(parts, dim=1) if parts else weight.new_empty(x.shape[0], 0, weight.shape[1])
        video = F.linear(tokens, weight, m.x_embedder.proj.bias)
        table = _rope(v0, v1, t1 - t0, grid, device)

        for block in m.transformer_blocks:
            context.enter_block(plan)
            video, text = _dual_stream_block(block, video, text, temb, table, attend)
        hidden = torch.cat([video, text], dim=1)
        for block in m.single_transformer_blocks:
            context.enter_block(plan)
            hidden = _single_stream_block(block, hidden, temb, table, attend)

        prediction = m.proj_out(m.norm_out(hidden[:, : v1 - v0], temb))
        write_tokens(prediction, out, v0, v1, patch)


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, shapes) if match), default=-1)


def _modulation(m: Any, timestep: Tensor, prompts: _Prompts) -> Tensor:
    """The vector [B, hidden] that modulates every block: timestep, pooled text, guidance, summed in ComfyUI's order."""
    embed, dtype = m.time_text_embed, prompts.pooled.dtype
    vector = embed.timestep_embedder(embed.time_proj(timestep).to(dtype)) + embed.text_embedder(prompts.pooled)
    if embed.guidance_embedder is not None and prompts.guidance is not None:
        # ComfyUI scales the guidance in its own dtype: 6.0 in bf16 becomes 6016, and that is what its results show.
        scaled = (prompts.guidance * 1000).float().expand(vector.shape[0])
        vector = vector + embed.guidance_embedder(embed.time_proj(scaled).to(dtype))
    return vector


def _refined_text(m: Any, timestep: Tensor, prompts: _Prompts) -> Tensor:
    """[B, L, hidden]: small, so every rank refines the whole text and then takes its rows."""
    refiner = m.context_embedder
    temb = refiner.time_text_embed(timestep, prompts.text_mean)
    hidden = refiner.proj_in(prompts.text)
    return refiner.token_refiner(hidden, temb, None) if hidden.shape[1] else hidden


def _rope(start: int, stop: int, text: int, grid: Grid, device: torch.device) -> Rope:
    """For video tokens [start, stop), then `text` text tokens, which are not rotated."""
    _, height, width = grid
    index = torch.arange(start, stop, device=device)
    positions = (index // (height * width), index // width % height, index % width)
    cos, sin = rope(positions, ROPE_AXES, ROPE_THETA)
    return F.pad(cos, (0, 0, 0, text), value=1.0), F.pad(sin, (0, 0, 0, text))


def _heads(x: Tensor, norm: Any = None) -> Tensor:
    """[B, S, H·D] → [B, S, H, D], RMS-normalised per head as ComfyUI does it (epsilon of the dtype)."""
    x = rearrange(x, "b s (h d) -> b s h d", d=HEAD_DIM)
    return x if norm is None else F.rms_norm(x, (HEAD_DIM,), norm.weight)


def _joint_qkv(attn: Any, video: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, S_r, H, D] of this rank's video rows, then text rows."""
    own = (
        _heads(attn.to_q(video), attn.norm_q),
        _heads(attn.to_k(video), attn.norm_k),
        _heads(attn.to_v(video)),
    )
    if not text.shape[1]:
        return own
    added = (
        _heads(attn.add_q_proj(text), attn.norm_added_q),
        _heads(attn.add_k_proj(text), attn.norm_added_k),
        _heads(attn.add_v_proj(text)),
    )
    return tuple(torch.cat([x, y], dim=1) for x, y in zip(own, added, strict=True))


def _dual_stream_block(
    block: Any, video: Tensor, text: Tensor, temb: Tensor, table: Rope, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """video [B, n, hidden], text [B, m, hidden] → the same; m may be 0 on this rank, and then costs nothing."""
    video_in, *video_gates = block.norm1(video, emb=temb)
    has_text = bool(text.shape[1])
    text_in, *text_gates = block.norm1_context(text, emb=temb) if has_text else (text,)
    q, k, v = _joint_qkv(block.attn, video_in, text_in)
    out = attend(rotate(q, table), rotate(k, table), v).flatten(2)
    video = _residuals(video, block.attn.to_out[0](out[:, : video.shape[1]]), video_gates, block.norm2, block.ff)
    if has_text:
        attended = block.attn.to_add_out(out[:, video.shape[1] :])
        text = _residuals(text, attended, text_gates, block.norm2_context, block.ff_context)
    return video, text


def _residuals(x: Tensor, attended: Tensor, gates: list[Tensor], norm: nn.Module, mlp: nn.Module) -> Tensor:
    gate_attention, shift, scale, gate_mlp = gates
    x = x + attended * gate_attention[:, None]
    return x + mlp(norm(x) * (1 + scale[:, None]) + shift[:, None]) * gate_mlp[:, None]


def _single_stream_block(block: Any, hidden: Tensor, temb: Tensor, table: Rope, attend: JointAttention) -> Tensor:
    """hidden [B, S_r, hidden]: both streams in one; only RoPE tells them apart."""
    normed, gate = block.norm(hidden, emb=temb)
    attn = block.attn
    q, k, v = _heads(attn.to_q(normed), attn.norm_q), _heads(attn.to_k(normed), attn.norm_k), _heads(attn.to_v(normed))
    # The first half of the MLP does not need the attention: it runs while tokens and heads are exchanged.
    out, mlp = attend.with_work(rotate(q, table), rotate(k, table), v, lambda: block.act_mlp(block.proj_mlp(normed)))
    return hidden + gate[:, None] * block.proj_out(torch.cat([out.flatten(2), mlp], dim=2))
