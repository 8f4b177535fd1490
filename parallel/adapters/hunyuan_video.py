"""HunyuanVideo (https://arxiv.org/abs/2412.03603): text-to-video, and image-to-video of both kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.rope import Rope, rope
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from ..plan import Range
from . import two_stream
from .base import Adapter, Piece, StepContext
from .patches import Grid, read_tokens, write_tokens
from .two_stream import HEAD_DIM, Modulation, Shapes, rename

ROPE_AXES = (16, 56, 56)
ROPE_THETA = 256.0

# Values that a diffusers config.json may leave out.
_DEFAULTS = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": HEAD_DIM, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "attention_head_dim": HEAD_DIM,
    "qk_norm": "rms_norm",
    "rope_theta": ROPE_THETA,
    "rope_axes_dim": list(ROPE_AXES),
}

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

# ComfyUI's names → diffusers' names, beside those of the blocks.
_RENAMED = [
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


@dataclass(frozen=True, slots=True)
class _Prompts:
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
    pooled: Tensor
    guidance: Tensor | None
    first_frame: Tensor | None
    """[b]: the timestep of the first frame, where it is a given picture that replaces noise."""


class HunyuanVideoAdapter(Adapter):
    family: ClassVar[str] = "hunyuan_video"
    read_directly: ClassVar[tuple[str, ...]] = ("x_embedder",)
    not_quantised: ClassVar[tuple[str, ...]] = two_stream.NOT_QUANTISED

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        names = {rename(name, _TENCENT) for name in tensors}
        return all(marker in names for marker in _MARKERS) and not any(other in names for other in _OTHER_FAMILIES)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "HunyuanVideoTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            config.pop("image_condition_type", None)  # says how its pipeline calls it; the weights are alike
            two_stream.require(source, _FIXED)
            return config
        shapes = {rename(name, _TENCENT): info.shape for name, info in source.tensors.items()}
        try:
            hidden, in_channels, *patch = shapes["img_in.proj.weight"]
            patch_t, patch_h, _ = patch
            return {
                "in_channels": in_channels,
                "out_channels": shapes["final_layer.linear.weight"][0] // prod(patch),
                "num_attention_heads": hidden // HEAD_DIM,
                "attention_head_dim": HEAD_DIM,
                "num_layers": two_stream.count(shapes, "double_blocks"),
                "num_single_layers": two_stream.count(shapes, "single_blocks"),
                "num_refiner_layers": two_stream.count(shapes, "txt_in.individual_token_refiner.blocks"),
                "patch_size": patch_h,
                "patch_size_t": patch_t,
                "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
                "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
                "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like HunyuanVideo, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        hidden = config["num_attention_heads"] * HEAD_DIM
        return two_stream.pieces(rename(name, _TENCENT), shape, hidden, _RENAMED)

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
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

    # --- inputs -------------------------------------------------------------------------------------------------

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if "ref_latent" in shapes:
            raise UnsupportedError(
                "HunyuanVideo (SP) cannot use the input ref_latent (guidance_type custom of HunyuanImageToVideo) yet;"
                " use v1 (concat) or v2 (replace)"
            )
        known = {"x", "timestep", "context", "y", "guidance", "attention_mask", "guiding_frame_index"}
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
        if len(shapes["y"]) != 2 or shapes["y"][1] < config["pooled_projection_dim"]:
            raise UnsupportedError(
                f"the pooled conditioning has the shape {list(shapes['y'])}; this checkpoint needs"
                f" [batch, {config['pooled_projection_dim']}]: is it from CLIP-L?"
            )
        if "attention_mask" in inputs and inputs["attention_mask"].is_floating_point():
            raise UnsupportedError("attention_mask is floating-point; HunyuanVideo (SP) needs an integer 0/1 mask")
        if len(shapes["timestep"]) != 1:
            raise UnsupportedError(f"HunyuanVideo needs one timestep per sample; got {list(shapes['timestep'])}")
        return prod(size // step for size, step in zip(x[2:], patch, strict=True))

    def prepare(self, conditioning: Mapping[str, Tensor]) -> list[_Prompts]:
        context, mask = conditioning["context"], conditioning.get("attention_mask")
        wide = context.float() if context.dtype == torch.float16 else context
        mean = (wide.sum(dim=1) / context.shape[1]).to(context.dtype)

        def prompts(rows: slice, keep: Tensor) -> _Prompts:
            def of(name: str) -> Tensor | None:
                value = conditioning.get(name)
                return value if value is None or len(value) == 1 else value[rows]

            return _Prompts(
                rows=rows,
                text=context[rows, keep],
                places=keep.nonzero().flatten().tolist(),
                padded=context.shape[1],
                text_mean=mean[rows],
                pooled=conditioning["y"][rows],
                guidance=of("guidance"),
                first_frame=of("guiding_frame_index"),
            )

        valid = context.new_ones(1, context.shape[1]) if mask is None else mask
        valid = valid.expand(context.shape[0], -1) != 0
        if (valid == valid[:1]).all():
            return [prompts(slice(None), valid[0])]
        # Unequal texts: one pass per sample, so that none attends to padding.
        return [prompts(slice(i, i + 1), keep) for i, keep in enumerate(valid)]

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
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        by = _modulation(m, timestep, prompts, grid, plan.stream_ranges(context.rank))
        text = _refined_text(m, timestep, prompts)[:, t0:t1]
        weight = m.x_embedder.proj.weight.flatten(1)
        video = F.linear(read_tokens(x, v0, v1, patch, weight), weight, m.x_embedder.proj.bias)
        table = two_stream.rope_with_text(_rope(v0, v1, grid, device), t1 - t0)
        video = two_stream.run_blocks(m, video, text, by, table, context, plan)
        write_tokens(two_stream.head(m, video, by), out, v0, v1, patch)


def _modulation(m: Any, timestep: Tensor, prompts: _Prompts, grid: Grid, ranges: tuple[Range, ...]) -> Modulation:
    """For a rank's ranges of video and text.

    A given first frame has a timestep of its own, and the guidance, too, as in ComfyUI (diffusers leaves it out). In
    the single-stream blocks ComfyUI (0.33) counts the frame's tokens along the joint sequence, text first: all of the
    text, with its padding, goes by the frame's timestep, and as many of the frame's last tokens do not.
    """
    vector = two_stream.modulation(m.time_text_embed, timestep, prompts.pooled, prompts.guidance)
    if prompts.first_frame is None:
        return Modulation.uniform(vector)
    given = prompts.first_frame.float().expand(len(timestep))
    first = two_stream.modulation(m.time_text_embed, given, prompts.pooled, prompts.guidance)
    (v0, v1), (t0, t1) = ranges
    frame = grid[1] * grid[2]

    def video(border: int) -> list[tuple[int, Tensor]]:
        count = min(max(border - v0, 0), v1 - v0)
        return [(count, first), (v1 - v0 - count, vector)]

    of_frame = sum(place < frame for place in prompts.places[t0:t1])
    text = [(of_frame, first), (t1 - t0 - of_frame, vector)]
    return Modulation(
        image=two_stream.vectors(video(frame)),
        text=two_stream.vectors([(t1 - t0, vector)]),
        joint=two_stream.vectors([*video(frame - prompts.padded), *text]),
    )


def _refined_text(m: Any, timestep: Tensor, prompts: _Prompts) -> Tensor:
    """[B, L, hidden]: small, so every rank refines the whole text and then takes its rows."""
    refiner = m.context_embedder
    temb = refiner.time_text_embed(timestep, prompts.text_mean)
    hidden = refiner.proj_in(prompts.text)
    return refiner.token_refiner(hidden, temb, None) if hidden.shape[1] else hidden


def _rope(start: int, stop: int, grid: Grid, device: torch.device) -> Rope:
    """For video tokens [start, stop)."""
    _, height, width = grid
    index = torch.arange(start, stop, device=device)
    return rope((index // (height * width), index // width % height, index % width), ROPE_AXES, ROPE_THETA)
