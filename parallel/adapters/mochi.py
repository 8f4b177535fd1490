"""Mochi 1 (https://github.com/genmoai/mochi): text-to-video.

Dual-stream blocks throughout, with a narrower text stream, norms on both sides of every layer, and a RoPE whose
frequencies are learned for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError
from . import two_stream
from .base import Adapter, Piece, StepContext, pack_text, unpack_text
from .inputs import normal, require_known, require_latent, require_one_time_each, require_text
from .patches import Grid, read_tokens, write_tokens
from .two_stream import Shapes, rename

AREA = 192 * 192
"""To which the tokens of a frame are spread before their positions are taken, in tokens."""
FREQUENCIES = 256
POOL_HEADS = 8
_PATCH: Grid = (1, 2, 2)

_DEFAULTS = {
    "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 48, "pooled_projection_dim": 1536,
    "in_channels": 12, "out_channels": None, "text_embed_dim": 4096,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {"patch_size": 2, "qk_norm": "rms_norm", "time_embed_dim": FREQUENCIES, "activation_fn": "swiglu"}

# ComfyUI's names → diffusers' names, for tensors that keep their shape.
_RENAMED = [
    (r"^x_embedder\.", "patch_embed."),
    (r"^t_embedder\.mlp\.0\.", "time_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_embed.timestep_embedder.linear_2."),
    (r"^t5_y_embedder\.", "time_embed.pooler."),
    (r"^t5_yproj\.", "time_embed.caption_proj."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.mod\.", "norm_out.linear."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.mod_x\.", ".norm1.linear."),
    (r"\.mod_y\.", ".norm1_context.linear."),
    (r"\.attn\.([qk])_norm_x\.", r".attn1.norm_\1."),
    (r"\.attn\.([qk])_norm_y\.", r".attn1.norm_added_\1."),
    (r"\.attn\.proj_x\.", ".attn1.to_out.0."),
    (r"\.attn\.proj_y\.", ".attn1.to_add_out."),
    (r"\.mlp_x\.w1\.", ".ff.net.0.proj."),
    (r"\.mlp_x\.w2\.", ".ff.net.2."),
    (r"\.mlp_y\.w1\.", ".ff_context.net.0.proj."),
    (r"\.mlp_y\.w2\.", ".ff_context.net.2."),
]
_FUSED_QKV = {
    ".attn.qkv_x": (".attn1.to_q", ".attn1.to_k", ".attn1.to_v"),
    ".attn.qkv_y": (".attn1.add_q_proj", ".attn1.add_k_proj", ".attn1.add_v_proj"),
}
_HALVES_SWAPPED = (".mlp_x.w1", ".mlp_y.w1", "final_layer.mod")
"""(activated, gate) → (gate, activated), and (shift, scale) → (scale, shift)."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: Tensor
    """[B, L, C], padding included."""
    mask: Tensor
    """[B, L]: what the pooled text is made of."""
    tokens: int
    """The text's first tokens, which take part in the attention."""


class MochiAdapter(Adapter):
    family: ClassVar[str] = "mochi"
    title: ClassVar[str] = "Mochi 1"
    makes: ClassVar[tuple[str, ...]] = ("T2V",)
    verified: ClassVar[str] = "ComfyUI with a patched detection, diffusers"
    read_directly: ClassVar[tuple[str, ...]] = ("patch_embed",)
    not_quantised: ClassVar[tuple[str, ...]] = (
        "x_embedder", "t_embedder", "t5_y_embedder", "t5_yproj", "mod_x", "mod_y", "final_layer",
    )  # fmt: skip

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(name in tensors for name in ("t5_yproj.weight", "pos_frequencies", "t5_y_embedder.to_kv.weight"))

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "MochiTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, _FIXED)
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            return config | {"out_channels": config["out_channels"] or config["in_channels"]}
        shapes = {name: info.shape for name, info in source.tensors.items()}
        try:
            _, heads, half = shapes["pos_frequencies"]
            return {
                "num_attention_heads": heads,
                "attention_head_dim": 2 * half,
                "num_layers": two_stream.count(shapes, "blocks"),
                "pooled_projection_dim": shapes["t5_yproj.weight"][0],
                "in_channels": shapes["x_embedder.proj.weight"][1],
                "out_channels": shapes["final_layer.linear.weight"][0] // prod(_PATCH),
                "text_embed_dim": shapes["t5_yproj.weight"][1],
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like Mochi, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel

        return MochiTransformer3DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        stem, _, leaf = name.rpartition(".")
        for fused, parts in _FUSED_QKV.items():
            if stem.endswith(fused):
                base = rename(stem.removesuffix(fused), _RENAMED)
                return two_stream.thirds([f"{base}{part}.{leaf}" for part in parts], shape[0])
        name = rename(name, _RENAMED)
        if stem == f"blocks.{config['num_layers'] - 1}.mod_y":  # the last block only scales its text
            name = name.replace(".linear.", ".linear_1.")
        return [Piece(name, two_stream.swap_halves)] if stem.endswith(_HALVES_SWAPPED) else [Piece(name)]

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        d, y, text = heads * head_dim, config["pooled_projection_dim"], config["text_embed_dim"]
        linear: Shapes = {
            "t_embedder.mlp.0": (d, FREQUENCIES),
            "t_embedder.mlp.2": (d, d),
            "t5_y_embedder.to_kv": (2 * text, text),
            "t5_y_embedder.to_q": (text, text),
            "t5_y_embedder.to_out": (d, text),
            "t5_yproj": (y, text),
            "final_layer.mod": (2 * d, d),
            "final_layer.linear": (config["out_channels"] * prod(_PATCH), d),
        }
        others: Shapes = {
            "pos_frequencies": (3, heads, head_dim // 2),
            "x_embedder.proj.weight": (d, config["in_channels"], *_PATCH[1:]),
            "x_embedder.proj.bias": (d,),
        }
        last = config["num_layers"] - 1
        for i in range(config["num_layers"]):
            for stream, width in (("x", d), ("y", y)):
                others[f"blocks.{i}.attn.qkv_{stream}.weight"] = (3 * d, width)
                others |= {f"blocks.{i}.attn.{name}_norm_{stream}.weight": (head_dim,) for name in ("q", "k")}
                if stream == "y" and i == last:
                    linear[f"blocks.{i}.mod_y"] = (y, d)
                    continue
                inner = 4 * width * 2 // 3
                linear |= {f"blocks.{i}.mod_{stream}": (4 * width, d), f"blocks.{i}.attn.proj_{stream}": (width, d)}
                others[f"blocks.{i}.mlp_{stream}.w1.weight"] = (2 * inner, width)
                others[f"blocks.{i}.mlp_{stream}.w2.weight"] = (width, inner)
        return two_stream.with_biases(linear) | others

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        require_known("Mochi", inputs, (), ("context", "attention_mask", "num_tokens"))
        x = inputs["x"]
        require_latent("Mochi", x, config["in_channels"], multiples=_PATCH)
        require_text(inputs, config["text_embed_dim"], "T5-XXL")
        require_one_time_each("Mochi", inputs["timestep"])
        return x.shape[2:].numel() // prod(_PATCH)

    def prepare(self, conditioning: Mapping[str, Tensor]) -> _Prompt:
        # ComfyUI attends to the text's first tokens, as many as the mask has ones, wherever in the mask they are.
        tokens = int(unpack_text(conditioning["num_tokens"]))
        return _Prompt(conditioning["context"], conditioning["attention_mask"], tokens)

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        random = normal(dtype)
        return {
            "x": random(1, config["in_channels"], 1, 4, 2 * world_size + 2),
            "timestep": torch.tensor([0.5]),
            "context": random(1, 7, config["text_embed_dim"]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "num_tokens": pack_text("5"),
        }

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        grid: Grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
        text = prepared.text[:, : prepared.tokens]
        plan = context.plan((prod(grid), text.shape[1]), m.config.num_attention_heads)
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        weight = m.patch_embed.proj.weight.flatten(1)
        video = F.linear(read_tokens(x, v0, v1, _PATCH, weight), weight, m.patch_embed.proj.bias)
        embed = m.time_embed
        vector = _embedded_times(embed, 1 - timestep, text.dtype) + embed.pooler(prepared.text, prepared.mask)
        table = _rope(m.pos_frequencies.to(text.dtype), v0, v1, grid, t1 - t0)
        by = F.silu(vector)

        def each_block(video: Tensor, text: Tensor) -> Blocks:
            attend, run, run_last = context.attention(plan), context.block(_block), context.block(_last_block)
            for block in m.transformer_blocks:
                context.enter_block(plan)
                if block.context_pre_only:
                    video = run_last(block, video, text, by, table, attend)
                else:
                    video, text = run(block, video, text, by, table, attend)
                yield video

        def probe() -> Tensor:
            return _scaled(video, m.transformer_blocks[0].norm1.linear(by).chunk(4, dim=1)[0])

        video = context.run_blocks(plan, video, each_block(video, embed.caption_proj(text[:, t0:t1])), probe)
        # ComfyUI's flow runs the other way: time and prediction are turned round.
        prediction = -m.proj_out(m.norm_out(video, vector))
        write_tokens(rearrange(prediction, "b s (p c) -> b s (c p)", p=prod(_PATCH)), out, v0, v1, _PATCH)


def _embedded_times(embed: Any, times: Tensor, dtype: torch.dtype) -> Tensor:
    """times [B], 0 … 1 → [B, hidden]; the frequencies are ComfyUI's to the bit."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angle = torch.outer(times * 1000, (steps * (-log(10000) / half)).exp())
    return embed.timestep_embedder(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))


def _rope(frequencies: Tensor, start: int, stop: int, grid: Grid, text: int) -> Rope:
    """[stop − start + text, H, D/2] each: of video tokens [start, stop), then of `text` rows that are not rotated.

    Args:
        frequencies: [3, H, D/2] along time, height and width, in the compute dtype, in which ComfyUI multiplies, too.
    """
    _, height, width = grid
    index = torch.arange(start, stop, device=frequencies.device)
    spread = (AREA / (width * height)) ** 0.5
    rows, columns = (_centres(count, spread).to(index.device) for count in (height, width))
    positions = (index // (height * width), rows[index // width % height], columns[index % width])
    position = torch.stack([part.to(frequencies) for part in positions], dim=1)
    angle = torch.einsum("sa,ahf->shf", position, frequencies)
    return F.pad(angle.cos(), (0, 0, 0, 0, 0, text), value=1.0), F.pad(angle.sin(), (0, 0, 0, 0, 0, text))


def _centres(count: int, spread: float) -> Tensor:
    """[count]: centres of the tokens along an axis of a frame, whose middle is 0."""
    edges = torch.linspace(-count * spread / 2, count * spread / 2, count + 1)
    return (edges[:-1] + edges[1:]) / 2


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, S, C], normalised, by scale [B, C]; in x's dtype, as ComfyUI does it (diffusers converts to fp32)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None])


def _added(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    return x + F.rms_norm(change, change.shape[-1:], eps=1e-6) * torch.tanh(gate)[:, None]


def _block(
    block: Any, video: Tensor, text: Tensor, by: Tensor, table: Rope, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """video [B, n, hidden], text [B, m, text hidden] → the same; m may be 0 on this rank, and then costs nothing."""
    scale, *gates = block.norm1.linear(by).chunk(4, dim=1)
    if not text.shape[1]:
        out = _attended(block.attn1, _scaled(video, scale), text, table, attend)
        return _after_attention(video, block.attn1.to_out[0](out), gates, block.ff), text
    text_scale, *text_gates = block.norm1_context.linear(by).chunk(4, dim=1)
    out = _attended(block.attn1, _scaled(video, scale), _scaled(text, text_scale), table, attend)
    own, of_text = out[:, : video.shape[1]], out[:, video.shape[1] :]
    text = _after_attention(text, block.attn1.to_add_out(of_text), text_gates, block.ff_context)
    return _after_attention(video, block.attn1.to_out[0](own), gates, block.ff), text


def _last_block(block: Any, video: Tensor, text: Tensor, by: Tensor, table: Rope, attend: JointAttention) -> Tensor:
    """video [B, n, hidden] → the same. The text takes part in the attention, and goes no further."""
    scale, *gates = block.norm1.linear(by).chunk(4, dim=1)
    if text.shape[1]:
        text = _scaled(text, block.norm1_context.linear_1(by))
    out = _attended(block.attn1, _scaled(video, scale), text, table, attend)
    return _after_attention(video, block.attn1.to_out[0](out[:, : video.shape[1]]), gates, block.ff)


def _attended(attn: Any, video: Tensor, text: Tensor, table: Rope, attend: JointAttention) -> Tensor:
    """video [B, n, hidden], text [B, m, text hidden], both scaled → [B, n + m, hidden]."""
    parts = two_stream.qkv(video, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), 1e-5)
    if text.shape[1]:
        layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        added = two_stream.qkv(text, layers, norms, 1e-5)
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, added, strict=True)]
    q, k, v = parts
    return attend(rotate(q, table), rotate(k, table), v).flatten(2)


def _after_attention(x: Tensor, attended: Tensor, gates: list[Tensor], mlp: nn.Module) -> Tensor:
    gate, scale_mlp, gate_mlp = gates
    x = _added(x, attended, gate)
    return _added(x, mlp(_scaled(x, scale_mlp)), gate_mlp)
