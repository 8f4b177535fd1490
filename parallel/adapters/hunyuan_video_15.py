"""HunyuanVideo 1.5 (https://arxiv.org/abs/2511.18870): text- and image-to-video.

Only dual-stream blocks. The second stream is the text, behind it ByT5's glyph tokens and the picture's SigLIP tokens,
where the conditioning has them. What it lacks is left out, as in ComfyUI, and not masked as in diffusers, which builds
a mask of all tokens by all tokens in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import hunyuan, two_stream
from .base import Adapter, Piece, StepContext
from .hunyuan import Prompts
from .patches import Grid, read_tokens, write_tokens
from .two_stream import HEAD_DIM, Modulation, Shapes, rename

_NAME = "HunyuanVideo 1.5"
_BYT5_HIDDEN = 2048

# Values that a diffusers config.json may leave out.
_DEFAULTS = {
    "in_channels": 65, "out_channels": 32, "num_attention_heads": 16, "attention_head_dim": HEAD_DIM, "num_layers": 54,
    "num_refiner_layers": 2, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 3584, "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
}  # fmt: skip

_MARKERS = ("cond_type_embedding.weight", "byt5_in.fc1.weight", "vision_in.proj.0.weight", "img_in.proj.weight")
# A tensor that only this relative has → the relative.
_RELATIVES = {
    "time_r_in.in_layer.weight": "with MeanFlow (step-distilled and super-resolution files)",
    "guidance_in.in_layer.weight": "with embedded guidance",
    "single_blocks.0.linear1.weight": "with single-stream blocks",
}

# ComfyUI's names → diffusers' names, where they are not HunyuanVideo's.
_RENAMED = [
    (r"^time_in\.", "time_embed.timestep_embedder."),
    (r"^byt5_in\.layernorm$", "context_embedder_2.norm"),
    (r"^byt5_in\.fc", "context_embedder_2.linear_"),
    (r"^vision_in\.proj\.0$", "image_embedder.norm_in"),
    (r"^vision_in\.proj\.1$", "image_embedder.linear_1"),
    (r"^vision_in\.proj\.3$", "image_embedder.linear_2"),
    (r"^vision_in\.proj\.4$", "image_embedder.norm_out"),
    (r"^cond_type_embedding$", "cond_type_embed"),
    *hunyuan.RENAMED,
]

# Inputs beside the text, in the order of their rows in `cond_type_embed`: size in the config, encoder.
_OTHER_STREAMS = {"txt_byt5": ("text_embed_2_dim", "ByT5"), "clip_fea": ("image_embed_dim", "SigLIP")}


class HunyuanVideo15Adapter(Adapter):
    family: ClassVar[str] = "hunyuan_video_15"
    title: ClassVar[str] = "HunyuanVideo 1.5"
    makes: ClassVar[tuple[str, ...]] = ("T2V", "I2V")
    full_precision: ClassVar[tuple[str, ...]] = ("cond_type_embed.weight",)
    read_directly: ClassVar[tuple[str, ...]] = ("x_embedder",)
    not_quantised: ClassVar[tuple[str, ...]] = (*two_stream.NOT_QUANTISED, "byt5_in", "vision_in")

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "HunyuanVideo15Transformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, hunyuan.FIXED | {"use_meanflow": False, "mlp_ratio": 4.0})
            return _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
        shapes = {rename(name, hunyuan.TENCENT): info.shape for name, info in source.tensors.items()}
        for marker, relative in _RELATIVES.items():
            if marker in shapes:
                raise UnsupportedError(f"{source.path}: {_NAME} {relative} is not supported yet (it has {marker!r})")
        try:
            hidden, in_channels, *patch = shapes["img_in.proj.weight"]
            patch_t, patch_h, _ = patch
            return {
                "in_channels": in_channels,
                "out_channels": shapes["final_layer.linear.weight"][0] // prod(patch),
                "num_attention_heads": hidden // HEAD_DIM,
                "attention_head_dim": HEAD_DIM,
                "num_layers": two_stream.count(shapes, "double_blocks"),
                "num_refiner_layers": two_stream.count(shapes, "txt_in.individual_token_refiner.blocks"),
                "patch_size": patch_h,
                "patch_size_t": patch_t,
                "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
                "text_embed_2_dim": shapes["byt5_in.fc1.weight"][1],
                "image_embed_dim": shapes["vision_in.proj.0.weight"][0],
            }
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source.path} looks like {_NAME}, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel

        return HunyuanVideo15Transformer3DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        hidden = config["num_attention_heads"] * HEAD_DIM
        return two_stream.pieces(rename(name, hunyuan.TENCENT), shape, hidden, _RENAMED)

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d, byt5, image = (config[key] for key in ("num_attention_heads", "text_embed_2_dim", "image_embed_dim"))
        d *= HEAD_DIM
        linear: Shapes = {
            "byt5_in.fc1": (_BYT5_HIDDEN, byt5),
            "byt5_in.fc2": (_BYT5_HIDDEN, _BYT5_HIDDEN),
            "byt5_in.fc3": (d, _BYT5_HIDDEN),
            "vision_in.proj.1": (image, image),
            "vision_in.proj.3": (d, image),
        }
        norms: Shapes = {"byt5_in.layernorm": (byt5,), "vision_in.proj.0": (image,), "vision_in.proj.4": (d,)}
        own = two_stream.with_biases(linear | norms) | {"cond_type_embedding.weight": (1 + len(_OTHER_STREAMS), d)}
        return hunyuan.native_tensors(config) | own

    # --- inputs -------------------------------------------------------------------------------------------------

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        # ComfyUI always passes a guidance, and the pooled text where there is one; the network has no use for them.
        known = {"x", "timestep", "context", "attention_mask", "y", "guidance", *_OTHER_STREAMS}
        if unknown := sorted(set(inputs) - known):
            raise UnsupportedError(f"{_NAME} (SP) cannot use the input {', '.join(unknown)} yet")
        for name, (size, encoder) in _OTHER_STREAMS.items():
            if name in inputs and (inputs[name].ndim != 3 or inputs[name].shape[2] != config[size]):
                raise UnsupportedError(
                    f"{name} has the shape {list(inputs[name].shape)}; this checkpoint needs"
                    f" [batch, tokens, {config[size]}]: is it from {encoder}?"
                )
        return hunyuan.check_video(_NAME, config, inputs)

    def prepare(self, conditioning: Mapping[str, Tensor]) -> list[Prompts]:
        return hunyuan.by_length(conditioning)

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        patch = config["patch_size"]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        return {
            "x": random(1, config["in_channels"], config["patch_size_t"], 2 * patch, (world_size + 1) * patch),
            "timestep": torch.tensor([500.0]),
            "context": random(1, 7, config["text_embed_dim"]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "txt_byt5": random(1, 2, config["text_embed_2_dim"]),
            "clip_fea": random(1, 1, config["image_embed_dim"]),
        }

    # --- one step -----------------------------------------------------------------------------------------------

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        for prompts in prepared:
            rows = prompts.rows
            self._step(model, x[rows], timestep[rows], prompts, out[rows], context)

    def _step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prompts: Prompts, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        config = m.config
        patch: Grid = (config.patch_size_t, config.patch_size, config.patch_size)
        grid: Grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))  # type: ignore[assignment]
        text = _text(m, timestep, prompts)
        plan = context.plan((prod(grid), text.shape[1]), config.num_attention_heads)
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        embed = m.time_embed
        by = Modulation.uniform(embed.timestep_embedder(embed.time_proj(timestep).to(text.dtype)))
        weight = m.x_embedder.proj.weight.flatten(1)
        video = F.linear(read_tokens(x, v0, v1, patch, weight), weight, m.x_embedder.proj.bias)
        table = two_stream.rope_with_text(hunyuan.positions(v0, v1, grid, text.device), t1 - t0)
        video = two_stream.run_blocks(m, video, text[:, t0:t1], by, table, context, plan)
        write_tokens(two_stream.head(m, video, by), out, v0, v1, patch)


def _text(m: Any, timestep: Tensor, prompts: Prompts) -> Tensor:
    """[B, L, hidden]: refined text, glyphs, picture. Small, so every rank embeds all of it and then takes its rows."""
    streams = [hunyuan.refined_text(m, timestep, prompts)]
    for name, embed in zip(_OTHER_STREAMS, (m.context_embedder_2, m.image_embedder), strict=True):
        stream = prompts.others.get(name)
        streams.append(streams[0][:, :0] if stream is None else embed(stream).expand(len(streams[0]), -1, -1))
    return torch.cat([part + kind.to(part) for part, kind in zip(streams, m.cond_type_embed.weight, strict=True)], 1)
