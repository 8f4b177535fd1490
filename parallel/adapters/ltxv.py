"""LTX-Video (https://arxiv.org/abs/2501.00103): text-to-video and image-to-video.

The video tokens are the one joint sequence. The text is not part of it: every rank holds all of it, without its
padding, and attends to it alone. A given picture replaces noise; its tokens have timesteps of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import two_stream
from .base import Adapter, Piece, StepContext, pack_text, unpack_text
from .inputs import alike, normal, require_known, require_latent, require_text
from .patches import Grid, read_tokens, write_tokens
from .two_stream import Shapes, rename

CAUSAL = "causal_temporal_positioning"
"""Whether the first frame's position counts it as one picture, as the video VAE does; so since version 0.9.5."""
PIXELS = (8, 32, 32)
"""Of a token along time, height and width."""
LARGEST = (20, 2048, 2048)
"""Seconds, height and width that the positions are relative to."""
ROPE_THETA = 10000.0
FRAME_RATE = 25.0
_PATCH: Grid = (1, 1, 1)

_DEFAULTS = {
    "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 64,
    "cross_attention_dim": 2048, "num_layers": 28, "caption_channels": 4096,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "patch_size": 1, "patch_size_t": 1, "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_bias": True, "attention_out_bias": True,
}  # fmt: skip

# The same for what a single file's metadata tells of its network.
_FIXED_METADATA = {
    "positional_embedding_theta": ROPE_THETA, "positional_embedding_max_pos": list(LARGEST),
    "vae_scale_factors": list(PIXELS), "use_middle_indices_grid": False, "timestep_scale_multiplier": 1000,
    "rope_type": "interleaved", "frequencies_precision": "float32", "cross_attention_adaln": False,
    "caption_proj_before_connector": False, "ff_bias": True,
}  # fmt: skip

_MARKERS = ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight", "scale_shift_table")
# A tensor that only this relative has → the relative.
_RELATIVES = {
    "audio_adaln_single.linear.weight": "LTX-2 (audio and video)",
    "keyframes_abs_pos_embedding": "LTXV with a keyframe embedding",
    "prompt_adaln_single.linear.weight": "LTXV with a modulated text",
}

# ComfyUI's names → diffusers' names.
_RENAMED = [
    (r"^patchify_proj\.", "proj_in."),
    (r"^adaln_single\.", "time_embed."),
    (r"\.([qk])_norm\.", r".norm_\1."),
]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Samples of a batch that can run together: their texts have the same valid tokens."""

    rows: slice
    """The samples' places in the batch."""
    text: Tensor
    """[b, L, C], valid tokens only."""
    frame_rate: float


class LTXVAdapter(Adapter):
    family: ClassVar[str] = "ltxv"
    title: ClassVar[str] = "LTX-Video"
    makes: ClassVar[tuple[str, ...]] = ("T2V", "I2V")
    verified: ClassVar[str] = "ComfyUI, diffusers"
    not_quantised: ClassVar[tuple[str, ...]] = (
        "patchify_proj", "adaln_single", "caption_projection", "proj_out",
    )  # fmt: skip

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)  # the relatives too: `model_config` refuses them by name

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "LTXVideoTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, _FIXED)
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            if CAUSAL not in config:
                raise UnsupportedError(
                    f"{source.path}: {CAUSAL} is not in config.json, and the weights do not tell it; add true for"
                    " LTX-Video 0.9.5 and newer, or false for 0.9.0 and 0.9.1; or use the single file"
                )
            return config
        for marker, relative in _RELATIVES.items():
            if marker in source.tensors:
                raise UnsupportedError(f"{source.path}: {relative} is not supported yet (it has {marker!r})")
        shapes = {name: info.shape for name, info in source.tensors.items()}
        told = _metadata(source)
        try:
            hidden, channels = shapes["patchify_proj.weight"]
            heads = told.get("num_attention_heads", _DEFAULTS["num_attention_heads"])
            return {
                "in_channels": channels,
                "out_channels": shapes["proj_out.weight"][0],
                "num_attention_heads": heads,
                "attention_head_dim": hidden // heads,
                "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
                "num_layers": two_stream.count(shapes, "transformer_blocks"),
                "caption_channels": shapes["caption_projection.linear_1.weight"][1],
                CAUSAL: bool(told.get(CAUSAL, False)),
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like LTXV, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

        def make(**config: Any) -> nn.Module:
            """diffusers' model, which leaves the positions to its caller; here its configuration tells of them, too."""
            causal = {CAUSAL: config.pop(CAUSAL)}
            model = LTXVideoTransformer3DModel(**config)
            model.register_to_config(**causal)
            return model

        return make

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        return [Piece(rename(name, _RENAMED))]

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d, text = config["num_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
        linear: Shapes = {
            "patchify_proj": (d, config["in_channels"]),
            "adaln_single.emb.timestep_embedder.linear_1": (d, 256),
            "adaln_single.emb.timestep_embedder.linear_2": (d, d),
            "adaln_single.linear": (6 * d, d),
            "caption_projection.linear_1": (d, config["caption_channels"]),
            "caption_projection.linear_2": (d, d),
            "proj_out": (config["out_channels"], d),
        }
        others: Shapes = {"scale_shift_table": (2, d)}
        for i in range(config["num_layers"]):
            block = f"transformer_blocks.{i}"
            for attention, width in (("attn1", d), ("attn2", text)):
                linear |= {f"{block}.{attention}.to_{name}": (d, width) for name in ("k", "v")}
                linear |= {f"{block}.{attention}.{name}": (d, d) for name in ("to_q", "to_out.0")}
                others |= {f"{block}.{attention}.{name}_norm.weight": (d,) for name in ("q", "k")}
            linear |= {f"{block}.ff.net.0.proj": (4 * d, d), f"{block}.ff.net.2": (d, 4 * d)}
            others[f"{block}.scale_shift_table"] = (6, d)
        return two_stream.with_biases(linear) | others

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        if "keyframe_idxs" in inputs and inputs["keyframe_idxs"].shape[2]:
            raise UnsupportedError("LTXV (SP) cannot use keyframes (LTXVAddGuide) yet; use LTXVImgToVideo")
        # ComfyUI passes the noise mask, too; the network sees it in the timesteps only.
        require_known("LTXV", inputs, ("attention_mask", "frame_rate", "denoise_mask", "keyframe_idxs"), ("context",))
        x, timestep = inputs["x"], inputs["timestep"]
        require_latent("LTXV", x, config["in_channels"])
        require_text(inputs, config["caption_channels"], "T5-XXL")
        tokens = x.shape[2:].numel()
        if timestep.ndim > 1 and timestep[0].numel() not in (1, tokens):
            raise UnsupportedError(
                f"LTXV needs one timestep per sample, or one per token ({tokens}); got {list(timestep.shape)}"
            )
        return tokens

    def prepare(self, conditioning: Mapping[str, Tensor]) -> list[_Prompts]:
        text = conditioning["context"]
        rate = float(unpack_text(conditioning["frame_rate"])) if "frame_rate" in conditioning else FRAME_RATE
        groups = alike(text, conditioning.get("attention_mask"))
        return [_Prompts(rows, text[rows, keep], rate) for rows, keep in groups]

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        random, frames = normal(dtype), world_size + 1
        return {
            "x": random(1, config["in_channels"], frames, 1, 3),
            "timestep": torch.linspace(0, 0.9, 3 * frames)[None, :, None],
            "context": random(1, 7, config["caption_channels"]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "frame_rate": pack_text("24"),
        }

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
        grid: Grid = tuple(x.shape[2:])  # type: ignore[assignment]
        plan = context.plan((x.shape[2:].numel(),), m.config.num_attention_heads)
        ((start, stop),) = plan.stream_ranges(context.rank)
        table = _rope(m.config, start, stop, grid, prompts)

        times = timestep.flatten(1) if timestep.ndim > 1 else timestep[:, None]
        own = times if times.shape[1] == 1 else times[:, start:stop]
        values, which = own.unique(return_inverse=True)  # most tokens share a timestep: each is embedded once
        modulation, vector = m.time_embed(1000 * values, hidden_dtype=prompts.text.dtype)
        modulation = modulation.unflatten(1, (6, -1))
        text = m.caption_projection(prompts.text)
        hidden = m.proj_in(read_tokens(x, start, stop, _PATCH, prompts.text))

        def each_block(hidden: Tensor) -> Blocks:
            attend, run = context.attention(plan), context.block(_block)
            for block in m.transformer_blocks:
                context.enter_block(plan)
                by = _OwnRows(modulation + block.scale_shift_table, which)
                hidden = run(block, hidden, by, table, text, attend)
                yield hidden

        def probe() -> Tensor:
            by = _OwnRows(modulation + m.transformer_blocks[0].scale_shift_table, which)
            return by.modulated(_norm(hidden), 0)

        hidden = context.run_blocks(plan, hidden, each_block(hidden), probe)
        by = _OwnRows(vector[:, None] + m.scale_shift_table, which)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=m.norm_out.eps)
        write_tokens(m.proj_out(by.modulated(hidden, 0)), out, start, stop, _PATCH)


@dataclass(frozen=True, slots=True)
class _OwnRows:
    """Takes modulations to this rank's tokens, one use at a time: all at once they would outweigh the tokens."""

    values: Tensor
    """[U, n, hidden]: n vectors for each timestep."""
    which: Tensor
    """[B, S_r] or [B, 1]: each token's timestep."""

    def vector(self, index: int) -> Tensor:
        """[B, S_r, hidden] or [B, 1, hidden]."""
        return self.values[:, index][self.which]

    def modulated(self, x: Tensor, shift: int) -> Tensor:
        """By the vectors `shift` and, for the scale, the one after it."""
        return x * (1 + self.vector(shift + 1)) + self.vector(shift)


def _metadata(source: Source) -> dict[str, Any]:
    """What a file's metadata says of its network; ComfyUI goes by it.

    Raises:
        UnsupportedError: it asks for other mathematics.
    """
    try:
        told = dict(json.loads(source.metadata.get("config", "{}")).get("transformer", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{source.path}: the metadata entry 'config' cannot be read: {error}") from error
    for key in _FIXED_METADATA.keys() & told.keys():
        if told[key] != _FIXED_METADATA[key]:
            raise UnsupportedError(
                f"{source.path}: {key} is {told[key]!r} in the file's metadata; only {_FIXED_METADATA[key]!r} is"
                " supported"
            )
    return told


def _rope(config: Any, start: int, stop: int, grid: Grid, prompts: _Prompts) -> Rope:
    """For video tokens [start, stop): [S_r, H, D/2] each.

    The angles run over the channels of all heads, from low to high frequency, so each head has angles of its own.
    """
    _, height, width = grid
    index = torch.arange(start, stop, device=prompts.text.device)
    time, row, column = index // (height * width) * PIXELS[0], index // width % height, index % width
    if config[CAUSAL]:
        time = (time + 1 - PIXELS[0]).clamp(min=0)
    places = (time.float() * (1.0 / prompts.frame_rate), (row * PIXELS[1]).float(), (column * PIXELS[2]).float())
    position = torch.stack([place / most for place, most in zip(places, LARGEST, strict=True)], dim=1)
    heads, hidden = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
    exponent = torch.linspace(log(1, ROPE_THETA), log(ROPE_THETA, ROPE_THETA), hidden // 6, device=index.device)
    frequencies = ROPE_THETA**exponent * pi / 2
    angle = (frequencies[:, None] * (position[:, None] * 2 - 1)).flatten(1)  # [S_r, hidden/6 · 3]
    still = (hidden // 2 - angle.shape[1], 0)  # the first channels, where hidden is no multiple of 6
    cos, sin = F.pad(angle.cos(), still, value=1.0), F.pad(angle.sin(), still)
    dtype = prompts.text.dtype  # to which ComfyUI rounds them
    return cos.to(dtype).unflatten(1, (heads, -1)), sin.to(dtype).unflatten(1, (heads, -1))


def _norm(x: Tensor) -> Tensor:
    """In x's dtype, as ComfyUI does it; diffusers' module converts to fp32."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _block(block: Any, hidden: Tensor, by: _OwnRows, table: Rope, text: Tensor, attend: JointAttention) -> Tensor:
    """hidden [B, S_r, hidden] → the same. The order of modulations is (shift, scale, gate), of attention, then MLP."""
    attn = block.attn1
    x = by.modulated(_norm(hidden), 0)
    q, k = (
        rotate(part.unflatten(2, (attn.heads, -1)), table)
        for part in (attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)))
    )
    v = attn.to_v(x).unflatten(2, (attn.heads, -1))
    # The text does not depend on the attention: it is projected while tokens and heads are exchanged.
    attended, outside = attend.with_work(q, k, v, lambda: _outside(block.attn2, text))
    hidden = hidden + attn.to_out[0](attended.flatten(2)) * by.vector(2)
    hidden = hidden + _cross_attention(block.attn2, hidden, *outside)
    return hidden + block.ff(by.modulated(_norm(hidden), 3)) * by.vector(5)


def _outside(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, L, hidden] of the text."""
    return attn.norm_k(attn.to_k(text)), attn.to_v(text)


def _cross_attention(attn: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This rank's rows [B, S_r, hidden] attend to the text; nothing is exchanged."""
    q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (attn.norm_q(attn.to_q(x)), k, v))
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
