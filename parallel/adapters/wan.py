"""Wan 2.1 and 2.2 (https://arxiv.org/abs/2503.20314): text-to-video, image-to-video by concatenated channels and CLIP
image tokens, and the 5B model with a timestep per frame.

The video tokens are the one joint sequence. The text is not part of it: every rank holds all of it and attends to it
alone. ComfyUI pads it with zeros and attends to the padding, so nothing may be trimmed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import two_stream
from .base import Adapter, Piece, StepContext
from .patches import Grid, read_tokens, write_tokens
from .two_stream import HEAD_DIM, Shapes, heads, rename

ROPE_AXES = (44, 42, 42)
ROPE_THETA = 10000.0
FREQUENCIES = 256
_PATCH: Grid = (1, 2, 2)

_MARKERS = ("head.modulation", "patch_embedding.weight", "blocks.0.self_attn.q.weight")
# A tensor that only this relative has → the relative.
_RELATIVES = {
    "vace_patch_embedding.weight": "VACE",
    "control_adapter.conv.weight": "Camera",
    "casual_audio_encoder.encoder.final_linear.weight": "S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Animate",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
    "ref_conv.weight": "with a reference image (ref_conv)",
}

# An input that is not supported yet → the nodes that set it.
_NODES = {
    "time_dim_concat": "WanPhantomSubjectToVideo",
    "reference_latent": "WanSoundImageToVideo, WanHuMoImageToVideo, Wan22FunControlToVideo",
}

# Values that a diffusers config.json may leave out.
_DEFAULTS = {
    "num_attention_heads": 40, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "ffn_dim": 13824,
    "num_layers": 40, "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "patch_size": list(_PATCH),
    "attention_head_dim": HEAD_DIM,
    "freq_dim": FREQUENCIES,
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "eps": 1e-6,
}

# ComfyUI's names → diffusers' names.
_RENAMED = [
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(q|k|v)\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"\.(k|v)_img\.", r".add_\1_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


class WanAdapter(Adapter):
    family: ClassVar[str] = "wan"
    title: ClassVar[str] = "Wan 2.1, 2.2"
    makes: ClassVar[tuple[str, ...]] = ("T2V", "I2V")
    full_precision: ClassVar[tuple[str, ...]] = ("patch_embedding.weight", "patch_embedding.bias")
    read_directly: ClassVar[tuple[str, ...]] = ("patch_embedding",)
    not_quantised: ClassVar[tuple[str, ...]] = (
        "text_embedding", "time_embedding", "time_projection", "img_emb", "head",
    )  # fmt: skip

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)  # the relatives too: `model_config` refuses them by name

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "WanTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, _FIXED)
            given = {key: value for key, value in source.config.items() if not key.startswith("_")}
            config = _DEFAULTS | _FIXED | given
            return config | {"out_channels": config["out_channels"] or config["in_channels"]}
        for marker, relative in _RELATIVES.items():
            if marker in source.tensors:
                raise UnsupportedError(f"{source.path}: Wan {relative} is not supported yet (it has {marker!r})")
        shapes = {name: info.shape for name, info in source.tensors.items()}
        try:
            hidden, in_channels = shapes["patch_embedding.weight"][:2]
            config = _FIXED | {
                "num_attention_heads": hidden // HEAD_DIM,
                "in_channels": in_channels,
                "out_channels": shapes["head.head.weight"][0] // prod(_PATCH),
                "text_dim": shapes["text_embedding.0.weight"][1],
                "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
                "num_layers": two_stream.count(shapes, "blocks"),
                "image_dim": shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.0.bias" in shapes else None,
                "added_kv_proj_dim": hidden if "img_emb.proj.0.bias" in shapes else None,
                "pos_embed_seq_len": shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None,
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like Wan, but is incomplete: {error}") from error
        _check_metadata(source, config)
        return config

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        return WanTransformer3DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        return [Piece(rename(name, _RENAMED))]

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d, image = config["num_attention_heads"] * HEAD_DIM, config["image_dim"]
        linear: Shapes = {
            "text_embedding.0": (d, config["text_dim"]),
            "text_embedding.2": (d, d),
            "time_embedding.0": (d, FREQUENCIES),
            "time_embedding.2": (d, d),
            "time_projection.1": (6 * d, d),
            "head.head": (config["out_channels"] * prod(_PATCH), d),
        }
        layer_norms: Shapes = {}
        others: Shapes = {
            "patch_embedding.weight": (d, config["in_channels"], *_PATCH),
            "patch_embedding.bias": (d,),
            "head.modulation": (1, 2, d),
        }
        if image is not None:
            linear |= {"img_emb.proj.1": (image, image), "img_emb.proj.3": (d, image)}
            layer_norms |= {"img_emb.proj.0": (image,), "img_emb.proj.4": (d,)}
        if config["pos_embed_seq_len"] is not None:
            others["img_emb.emb_pos"] = (1, config["pos_embed_seq_len"], image)
        for i in range(config["num_layers"]):
            block = f"blocks.{i}"
            for attention, images in (("self_attn", False), ("cross_attn", image is not None)):
                linear |= {f"{block}.{attention}.{name}": (d, d) for name in ("q", "k", "v", "o")}
                others |= {f"{block}.{attention}.norm_{name}.weight": (d,) for name in ("q", "k")}
                if images:
                    linear |= {f"{block}.{attention}.{name}_img": (d, d) for name in ("k", "v")}
                    others[f"{block}.{attention}.norm_k_img.weight"] = (d,)
            linear |= {f"{block}.ffn.0": (config["ffn_dim"], d), f"{block}.ffn.2": (d, config["ffn_dim"])}
            layer_norms[f"{block}.norm3"] = (d,)
            others[f"{block}.modulation"] = (1, 6, d)
        return two_stream.with_biases(linear | layer_norms) | others

    # --- inputs -------------------------------------------------------------------------------------------------

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        # ComfyUI passes the noise mask, too; the network sees it in the timesteps only.
        known = {"x", "timestep", "context", "clip_fea", "denoise_mask"}
        if unknown := sorted(set(shapes) - known):
            nodes = [_NODES[name] for name in unknown if name in _NODES]
            made_by = f" (as {', '.join(nodes)} make it)" if nodes else ""
            raise UnsupportedError(f"Wan (SP) cannot use the input {', '.join(unknown)} yet{made_by}")
        if "context" not in shapes:
            raise UnsupportedError("Wan needs a text encoder's conditioning ('context'); the conditioning has none")
        x, timestep, context = shapes["x"], shapes["timestep"], shapes["context"]
        if len(x) != 5 or x[1] != config["in_channels"]:
            raise UnsupportedError(
                f"this Wan checkpoint needs a latent of shape [batch, {config['in_channels']}, frames, height, width],"
                f" concatenated channels included; it is {list(x)}"
            )
        if len(context) != 3 or context[2] != config["text_dim"]:
            raise UnsupportedError(
                f"the text conditioning has the shape {list(context)}; this checkpoint needs"
                f" [batch, tokens, {config['text_dim']}]: is it from UMT5-XXL?"
            )
        if len(timestep) != 1 and (len(timestep) != 2 or timestep[1] not in (1, x[2])):
            raise UnsupportedError(
                f"Wan needs one timestep per sample, or one per frame ({x[2]}); got {list(timestep)}"
            )
        if "clip_fea" in shapes and config["image_dim"] is not None:
            self._check_image(config, shapes["clip_fea"])
        return prod(_grid(x))

    @staticmethod
    def _check_image(config: Mapping[str, Any], image: tuple[int, ...]) -> None:
        if len(image) != 3 or image[2] != config["image_dim"]:
            raise UnsupportedError(
                f"the CLIP vision output has the shape {list(image)}; this checkpoint needs"
                f" [batch, tokens, {config['image_dim']}]: is it from CLIP ViT-H?"
            )
        most = config["pos_embed_seq_len"]
        if most is not None and image[1] > most:
            raise UnsupportedError(f"the CLIP vision output has {image[1]} tokens; this checkpoint takes {most}")

    def prepare(self, conditioning: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return conditioning

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        frames = world_size + 1
        inputs = {
            "x": random(1, config["in_channels"], frames, 2, 2 * frames),
            "timestep": torch.linspace(0, 900, frames)[None],
            "context": random(1, 7, config["text_dim"]),
        }
        return inputs if config["image_dim"] is None else inputs | {"clip_fea": random(1, 3, config["image_dim"])}

    # --- one step -----------------------------------------------------------------------------------------------

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        # ComfyUI wraps odd sizes around to whole patches.
        x = F.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2, 0, 0), mode="circular") if _is_odd(x) else x
        grid = _grid(x.shape)
        plan = context.plan((prod(grid),), m.config.num_attention_heads)
        ((start, stop),) = plan.stream_ranges(context.rank)
        index = torch.arange(start, stop, device=timestep.device)
        frame, in_frame = index // (grid[1] * grid[2]), index % (grid[1] * grid[2])
        table = rope((frame, in_frame // grid[2], in_frame % grid[2]), ROPE_AXES, ROPE_THETA)

        text, image = _embedded(m.condition_embedder, prepared)
        times, modulation = _embedded_times(m.condition_embedder, timestep, text.dtype)
        own = _OwnRows(frame if times.shape[1] > 1 else None)
        weight = m.patch_embedding.weight.flatten(1)  # fp32, as ComfyUI keeps and applies it
        hidden = F.linear(read_tokens(x, start, stop, _PATCH, weight), weight, m.patch_embedding.bias).type_as(text)

        def each_block(hidden: Tensor) -> Blocks:
            attend, run = context.attention(plan), context.block(_block)
            for block in m.blocks:
                context.enter_block(plan)
                hidden = run(block, hidden, modulation, own, table, text, image, attend)
                yield hidden

        hidden = context.run_blocks(plan, hidden, each_block(hidden), lambda: modulation)
        shift, scale = (m.scale_shift_table + times[:, :, None]).unbind(2)
        hidden = m.proj_out(own.modulate(_norm(m.norm_out, hidden), shift, scale))
        write_tokens(rearrange(hidden, "b s (p c) -> b s (c p)", p=prod(_PATCH)), out, start, stop, _PATCH)


@dataclass(frozen=True, slots=True)
class _OwnRows:
    """Takes modulations [B, frames, C] to this rank's tokens, one use at a time: all at once they would outweigh the
    tokens."""

    frames: Tensor | None
    """[S_r]: each token's frame; None where all frames share one timestep."""

    def __call__(self, part: Tensor) -> Tensor:
        """[B, F, C] → [B, S_r, C], or [B, 1, C] as it is."""
        return part if self.frames is None else part[:, self.frames]

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(self(shift), x, 1 + self(scale))

    def add(self, x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, change, self(gate))


def _check_metadata(source: Source, config: Mapping[str, Any]) -> None:
    """ComfyUI lets a file's metadata override what the shapes say.

    Raises:
        UnsupportedError: they differ from it.
    """
    try:
        told = json.loads(source.metadata.get("config", "{}")).get("transformer", {})
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{source.path}: the metadata entry 'config' cannot be read: {error}") from error
    expected = {
        "model_type": "t2v" if config["image_dim"] is None else "i2v",
        "causal_ar": False,
        "num_heads": config["num_attention_heads"],
        "eps": config["eps"],
        "freq_dim": FREQUENCIES,
        "patch_size": list(_PATCH),
    }
    for key in expected.keys() & told.keys():
        if told[key] != expected[key]:
            raise UnsupportedError(
                f"{source.path}: {key} is {told[key]!r} in the file's metadata; only {expected[key]!r} is supported"
            )


def _is_odd(x: Tensor) -> bool:
    return bool(x.shape[3] % 2 or x.shape[4] % 2)


def _grid(shape: tuple[int, ...]) -> Grid:
    """Patches along time, height and width of a latent [B, C, T, H, W]; an incomplete one counts."""
    return tuple(-(-size // p) for size, p in zip(shape[2:], _PATCH, strict=True))  # type: ignore[return-value]


def _embedded(embedder: Any, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Text and image tokens [B, L, hidden]; no image tokens where the model has no place for them."""
    text = embedder.text_embedder(conditioning["context"])
    if embedder.image_embedder is None:
        return text, None
    if "clip_fea" not in conditioning:
        return text, text  # what ComfyUI's image attention gets then
    clip, module = conditioning["clip_fea"], embedder.image_embedder
    if module.pos_embed is not None:
        clip = clip + module.pos_embed[:, : clip.shape[1]]
    return text, _norm(module.norm2, module.ff(_norm(module.norm1, clip)))


def _embedded_times(embedder: Any, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """timestep [B] or [B, F] → [B, F, hidden] and [B, F, 6, hidden], with F = 1 for the former.

    The frequencies are ComfyUI's to the bit: at a timestep of 1000 those of diffusers differ by 10⁻⁴.
    """
    half = FREQUENCIES // 2
    exponent = -torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = torch.outer(timestep.flatten().float(), torch.pow(10000, exponent))
    waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
    times = embedder.time_embedder(waves).unflatten(0, (timestep.shape[0], -1))
    return times, embedder.time_proj(F.silu(times)).unflatten(2, (6, -1))


def _block(
    block: Any,
    hidden: Tensor,
    modulation: Tensor,
    own: _OwnRows,
    table: Rope,
    text: Tensor,
    image: Tensor | None,
    attend: JointAttention,
) -> Tensor:
    """hidden [B, S_r, hidden] → the same."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + modulation).unbind(2)
    attn = block.attn1
    x = own.modulate(_norm(block.norm1, hidden), shift, scale)
    q, k = (rotate(heads(part), table) for part in (attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x))))
    # Text and image do not depend on the attention: they are projected while tokens and heads are exchanged.
    attended, outside = attend.with_work(q, k, heads(attn.to_v(x)), lambda: _outside(block.attn2, text, image))
    hidden = own.add(hidden, attn.to_out[0](attended.flatten(2)), gate)
    hidden = hidden + _cross_attention(block.attn2, _norm(block.norm2, hidden), outside)
    return own.add(hidden, block.ffn(own.modulate(_norm(block.norm3, hidden), shift_mlp, scale_mlp)), gate_mlp)


def _outside(attn: Any, text: Tensor, image: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, L, hidden] of the image, where there is one, and of the text."""
    pairs = [] if image is None else [(attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))]
    return [*pairs, (attn.norm_k(attn.to_k(text)), attn.to_v(text))]


def _cross_attention(attn: Any, x: Tensor, outside: list[tuple[Tensor, Tensor]]) -> Tensor:
    """This rank's rows [B, S_r, hidden] attend to image and text apart; nothing is exchanged."""
    q = heads(attn.norm_q(attn.to_q(x))).transpose(1, 2)
    results = [
        F.scaled_dot_product_attention(q, heads(k).transpose(1, 2), heads(v).transpose(1, 2)) for k, v in outside
    ]
    out = results[0] if len(results) == 1 else results[1] + results[0]
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _norm(module: Any, x: Tensor) -> Tensor:
    """Layer norm in x's dtype, as ComfyUI does it; diffusers' modules convert to fp32 and back."""
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
