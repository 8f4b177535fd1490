"""Two-stream transformers, the design of FLUX and HunyuanVideo: dual-stream blocks, then single-stream blocks.

The mathematics is ComfyUI's, on diffusers' modules, whose names both families share. Both streams are split over the
ranks, so these functions take this rank's rows of each stream (possibly none) instead of diffusers' slicing by text
length. "Image" stands for video, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source
from ..errors import UnsupportedError
from ..plan import SequencePlan
from .base import Piece, StepContext

HEAD_DIM = 128
"""ComfyUI's loader knows these families with this head size only."""

NOT_QUANTISED = (
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "img_mod", "txt_mod", "modulation", "final_layer",
)  # fmt: skip

# ComfyUI's names → diffusers' names, for tensors of the blocks and embedders that keep their shape.
RENAMED = [
    (r"^time_in\.", "time_text_embed.timestep_embedder."),
    (r"^vector_in\.", "time_text_embed.text_embedder."),
    (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
    (r"^final_layer\.linear$", "proj_out"),
    (r"^double_blocks\.", "transformer_blocks."),
    (r"^single_blocks\.", "single_transformer_blocks."),
    (r"\.in_layer$", ".linear_1"),
    (r"\.out_layer$", ".linear_2"),
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
]

# Fused projections and the parameters that their thirds become.
_FUSED_QKV = {
    ".img_attn.qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
    ".txt_attn.qkv": (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"),
    ".self_attn.qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
}

Shapes = dict[str, tuple[int, ...]]

Vectors = tuple[tuple[slice, Tensor], ...]
"""Which vector [B, hidden] modulates which rows; the slices follow each other and cover all of them."""


@dataclass(frozen=True, slots=True)
class Modulation:
    """The vectors of this rank's rows."""

    image: Vectors
    """In the dual-stream blocks, and before the output."""
    text: Vectors
    joint: Vectors
    """In the single-stream blocks: image rows, then text rows."""

    @classmethod
    def uniform(cls, vector: Tensor) -> Modulation:
        """One vector for all."""
        vectors = ((slice(None), vector),)
        return cls(vectors, vectors, vectors)


def vectors(parts: list[tuple[int, Tensor]]) -> Vectors:
    """From (number of rows, their vector), in order; rows of one vector that meet become one slice."""
    result: list[tuple[slice, Tensor]] = []
    start = 0
    for count, vector in [part for part in parts if part[0]] or parts[:1]:
        stop = start + count
        if result and result[-1][1] is vector:
            start = result.pop()[0].start
        result.append((slice(start, stop), vector))
        start = stop
    return tuple(result)


def rename(name: str, table: list[tuple[str, str]]) -> str:
    """Applies every pattern of `table` in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def require(source: Source, fixed: Mapping[str, Any]) -> None:
    """Checks values of a diffusers config.json that the mathematics here takes for granted.

    Raises:
        UnsupportedError: one differs.
    """
    for key, needed in fixed.items():
        if (value := (source.config or {}).get(key, needed)) != needed:
            raise UnsupportedError(f"{source.path}: {key} is {value} in config.json; only {needed} is supported")


def pieces(name: str, shape: tuple[int, ...], hidden: int, table: list[tuple[str, str]]) -> list[Piece]:
    """Where the tensor `name` (ComfyUI's) goes; `table` renames what keeps its shape."""
    stem, _, leaf = name.rpartition(".")
    if stem == "final_layer.adaLN_modulation.1":  # (shift, scale) → (scale, shift)
        return [Piece(f"norm_out.linear.{leaf}", swap_halves)]
    for fused, parts in _FUSED_QKV.items():
        if stem.endswith(fused):
            base = rename(stem.removesuffix(fused) + ".", table).removesuffix(".")
            return thirds([f"{base}{part}.{leaf}" for part in parts], shape[0])
    if stem.endswith(".linear1"):  # q, k, v and the first half of the MLP in one projection
        base = rename(stem.removesuffix(".linear1") + ".", table).removesuffix(".")
        names = (".attn.to_q", ".attn.to_k", ".attn.to_v")
        qkv = thirds([f"{base}{part}.{leaf}" for part in names], 3 * hidden)
        return [*qkv, Piece(f"{base}.proj_mlp.{leaf}", _rows(3 * hidden, shape[0]))]
    return [Piece(f"{rename(stem, table)}.{leaf}")]


def thirds(names: list[str], rows: int) -> list[Piece]:
    """The parameters `names`, each the next third of a tensor's first `rows`."""
    third = rows // len(names)
    return [Piece(name, _rows(i * third, (i + 1) * third)) for i, name in enumerate(names)]


def _rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start:stop]


def swap_halves(tensor: Tensor) -> Tensor:
    """For `Piece.take`: the second half of the rows, then the first."""
    return torch.cat(tensor.chunk(2)[::-1])


def block_tensors(config: Mapping[str, Any]) -> tuple[Shapes, dict[str, int]]:
    """Linear layers (name → weight shape; each has a bias) and norms (name → size) of blocks, embedders and head."""
    d = config["num_attention_heads"] * HEAD_DIM
    mlp = 4 * d
    linear: Shapes = {"final_layer.adaLN_modulation.1": (2 * d, d)}
    if "pooled_projection_dim" in config:
        linear |= {"vector_in.in_layer": (d, config["pooled_projection_dim"]), "vector_in.out_layer": (d, d)}
    for embedder in ("time_in", *(["guidance_in"] if config.get("guidance_embeds") else [])):
        linear |= {f"{embedder}.in_layer": (d, 256), f"{embedder}.out_layer": (d, d)}
    norms: dict[str, int] = {}
    for i in range(config["num_layers"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear |= {f"{block}_attn.qkv": (3 * d, d), f"{block}_attn.proj": (d, d)}
            linear |= {f"{block}_mlp.0": (mlp, d), f"{block}_mlp.2": (d, mlp), f"{block}_mod.lin": (6 * d, d)}
            norms |= {f"{block}_attn.norm.query_norm": HEAD_DIM, f"{block}_attn.norm.key_norm": HEAD_DIM}
    for i in range(config.get("num_single_layers", 0)):
        block = f"single_blocks.{i}"
        linear |= {f"{block}.linear1": (3 * d + mlp, d), f"{block}.linear2": (d, d + mlp)}
        linear[f"{block}.modulation.lin"] = (3 * d, d)
        norms |= {f"{block}.norm.query_norm": HEAD_DIM, f"{block}.norm.key_norm": HEAD_DIM}
    return linear, norms


def with_biases(linear: Shapes) -> Shapes:
    """Weight and bias of each linear layer."""
    return {f"{n}.{leaf}": s for n, w in linear.items() for leaf, s in (("weight", w), ("bias", w[:1]))}


def count(shapes: Mapping[str, Any], prefix: str) -> int:
    """Modules in the list `prefix`."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, shapes) if match), default=-1)


def modulation(embed: Any, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
    """The vector [B, hidden] that modulates every block.

    Args:
        embed: the model's `time_text_embed`.
        timestep: [B] on the scale of 0 … 1000, fp32.
        pooled: pooled text, in the compute dtype; of one that is too wide the first part counts, as in ComfyUI.
        guidance: [B] or [1] in the dtype in which ComfyUI hands it over: its scaling by 1000 rounds there (6.0 in bf16
            becomes 6016), and that is what ComfyUI's results show.
    """
    pooled = pooled[:, : embed.text_embedder.linear_1.in_features]
    vector = embed.timestep_embedder(embed.time_proj(timestep).to(pooled.dtype)) + embed.text_embedder(pooled)
    if getattr(embed, "guidance_embedder", None) is not None and guidance is not None:
        scaled = (guidance * 1000).float().expand(vector.shape[0])
        vector = vector + embed.guidance_embedder(embed.time_proj(scaled).to(pooled.dtype))
    return vector


def run_blocks(
    model: Any, image: Tensor, text: Tensor, by: Modulation, table: Rope, context: StepContext, plan: SequencePlan
) -> Tensor:
    """All blocks on this rank's image [B, n, hidden] and text [B, m, hidden] rows; returns the image rows.

    `table` is for n + m rows.
    """

    def probe() -> Tensor:
        return _modulated(model.transformer_blocks[0].norm1, image, by.image)[0]

    return context.run_blocks(plan, image, _each_block(model, image, text, by, table, context, plan), probe)


def _each_block(
    model: Any, image: Tensor, text: Tensor, by: Modulation, table: Rope, context: StepContext, plan: SequencePlan
) -> Blocks:
    """Yields the image rows after each block."""
    attend, dual_stream_block = context.attention(plan), context.block(_dual_stream_block)
    for block in model.transformer_blocks:
        context.enter_block(plan)
        image, text = dual_stream_block(block, image, text, by, table, attend)
        yield image
    if not hasattr(model, "single_transformer_blocks"):
        return
    single_stream_block = context.block(_single_stream_block)
    hidden = torch.cat([finite(image), text], dim=1)
    for block in model.single_transformer_blocks:
        context.enter_block(plan)
        hidden = single_stream_block(block, hidden, by.joint, table, attend)
        yield hidden[:, : image.shape[1]]


def head(model: Any, image: Tensor, by: Modulation) -> Tensor:
    """The output projection of image rows [B, n, hidden]."""
    return model.proj_out(join([model.norm_out(image[:, rows], vector) for rows, vector in by.image]))


def rope_with_text(table: Rope, text: int) -> Rope:
    """Appends `text` rows that are not rotated."""
    cos, sin = table
    return F.pad(cos, (0, 0, 0, text), value=1.0), F.pad(sin, (0, 0, 0, text))


def finite(x: Tensor) -> Tensor:
    """As ComfyUI: fp16 can overflow here."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def heads(x: Tensor, norm: Any = None) -> Tensor:
    """[B, S, H·D] → [B, S, H, D], RMS-normalised per head as ComfyUI does it (epsilon of the dtype)."""
    x = x.unflatten(-1, (-1, HEAD_DIM))
    return x if norm is None else F.rms_norm(x, (HEAD_DIM,), norm.weight)


def qkv(x: Tensor, layers: Sequence[Any], norms: Sequence[Any], eps: float | None) -> list[Tensor]:
    """x [B, S, C] → q, k, v [B, S, H, D], of which the norms, for D channels, are applied to q and k.

    `eps` None is the epsilon of the dtype.
    """
    q, k, v = [layer(x).unflatten(2, (-1, norms[0].weight.shape[0])) for layer in layers]
    normed = [F.rms_norm(part, norm.weight.shape, norm.weight, eps) for part, norm in zip((q, k), norms, strict=True)]
    return [*normed, v]


def _joint_qkv(attn: Any, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, S_r, H, D] of this rank's image rows, then text rows."""
    own = (
        heads(attn.to_q(image), attn.norm_q),
        heads(attn.to_k(image), attn.norm_k),
        heads(attn.to_v(image)),
    )
    if not text.shape[1]:
        return own
    added = (
        heads(attn.add_q_proj(text), attn.norm_added_q),
        heads(attn.add_k_proj(text), attn.norm_added_k),
        heads(attn.add_v_proj(text)),
    )
    return tuple(torch.cat([x, y], dim=1) for x, y in zip(own, added, strict=True))


def join(parts: list[Tensor]) -> Tensor:
    """Rows one after the other; one part alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


ByRows = tuple[tuple[slice, tuple[Tensor, ...]], ...]
"""Shift, scale and gate of the attention, then of the MLP, if it has its own, each [B, 1, hidden], and their rows."""


def by_rows(mod: nn.Module, vectors: Vectors) -> ByRows:
    """What a modulation layer makes of each vector."""
    return tuple((rows, mod(vector)[:, None].split(vector.shape[1], dim=2)) for rows, vector in vectors)


def modulate(x: Tensor, by: ByRows, shift: int) -> Tensor:
    """x [B, S, hidden], normalised, by the parts `shift` and, for the scale, the one after it."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return join([torch.addcmul(own[shift], normed[:, rows], 1 + own[shift + 1]) for rows, own in by])


def add_gated(x: Tensor, change: Tensor, by: ByRows, gate: int) -> Tensor:
    """x + change · the part `gate`, all [B, S, hidden]."""
    return join([torch.addcmul(x[:, rows], own[gate], change[:, rows]) for rows, own in by])


_Gates = list[tuple[slice, list[Tensor]]]
"""What a norm made of each vector for the rest of the block, each [B, hidden], and the rows it is for."""


def _modulated(norm: nn.Module, x: Tensor, vectors: Vectors) -> tuple[Tensor, _Gates]:
    """x [B, S, hidden], normalised and modulated, and the gates."""
    parts, gates = [], []
    for rows, vector in vectors:
        part, *rest = norm(x[:, rows], emb=vector)
        parts.append(part)
        gates.append((rows, rest))
    return join(parts), gates


def _dual_stream_block(
    block: Any, image: Tensor, text: Tensor, by: Modulation, table: Rope, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """image [B, n, hidden], text [B, m, hidden] → the same; m may be 0 on this rank, and then costs nothing."""
    image_in, image_gates = _modulated(block.norm1, image, by.image)
    has_text = bool(text.shape[1])
    text_in, text_gates = _modulated(block.norm1_context, text, by.text) if has_text else (text, [])
    q, k, v = _joint_qkv(block.attn, image_in, text_in)
    out = attend(rotate(q, table), rotate(k, table), v).flatten(2)
    image = _residuals(image, block.attn.to_out[0](out[:, : image.shape[1]]), image_gates, block.norm2, block.ff)
    if has_text:
        attended = block.attn.to_add_out(out[:, image.shape[1] :])
        text = _residuals(text, attended, text_gates, block.norm2_context, block.ff_context)
    return image, finite(text)


def _residuals(x: Tensor, attended: Tensor, gates: _Gates, norm: nn.Module, mlp: nn.Module) -> Tensor:
    parts = []
    for rows, (gate_attention, shift, scale, gate_mlp) in gates:
        part = x[:, rows] + attended[:, rows] * gate_attention[:, None]
        parts.append(part + mlp(norm(part) * (1 + scale[:, None]) + shift[:, None]) * gate_mlp[:, None])
    return join(parts)


def _single_stream_block(block: Any, hidden: Tensor, vectors: Vectors, table: Rope, attend: JointAttention) -> Tensor:
    """hidden [B, S_r, hidden]: both streams in one; only RoPE tells them apart."""
    normed, gates = _modulated(block.norm, hidden, vectors)
    attn = block.attn
    q, k, v = heads(attn.to_q(normed), attn.norm_q), heads(attn.to_k(normed), attn.norm_k), heads(attn.to_v(normed))
    # The first half of the MLP does not need the attention: it runs while tokens and heads are exchanged.
    out, mlp = attend.with_work(rotate(q, table), rotate(k, table), v, lambda: block.act_mlp(block.proj_mlp(normed)))
    out = block.proj_out(torch.cat([out.flatten(2), mlp], dim=2))
    return finite(join([hidden[:, rows] + gate[:, None] * out[:, rows] for rows, (gate,) in gates]))
