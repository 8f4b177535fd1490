"""HunyuanVideo (https://arxiv.org/abs/2412.03603): text-to-video, and image-to-video of both kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from ..plan import Range
from . import hunyuan, two_stream
from .base import Adapter, Piece, StepContext
from .hunyuan import Prompts
from .patches import Grid, read_tokens, write_tokens
from .two_stream import HEAD_DIM, Modulation, Shapes, rename

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


class HunyuanVideoAdapter(Adapter):
    family: ClassVar[str] = "hunyuan_video"
    title: ClassVar[str] = "HunyuanVideo"
    makes: ClassVar[tuple[str, ...]] = ("T2V", "I2V")
    read_directly: ClassVar[tuple[str, ...]] = ("x_embedder",)
    not_quantised: ClassVar[tuple[str, ...]] = two_stream.NOT_QUANTISED

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        names = {rename(name, hunyuan.TENCENT) for name in tensors}
        return all(marker in names for marker in _MARKERS) and not any(other in names for other in _OTHER_FAMILIES)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "HunyuanVideoTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            config.pop("image_condition_type", None)  # says how its pipeline calls it; the weights are alike
            two_stream.require(source, hunyuan.FIXED)
            return config
        shapes = {rename(name, hunyuan.TENCENT): info.shape for name, info in source.tensors.items()}
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
        return two_stream.pieces(rename(name, hunyuan.TENCENT), shape, hidden, hunyuan.RENAMED)

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        return hunyuan.native_tensors(config)

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
        if "y" not in shapes:
            raise UnsupportedError("HunyuanVideo needs the pooled output of CLIP-L ('y'); the conditioning has none")
        tokens = hunyuan.check_video("HunyuanVideo", config, inputs)
        if len(shapes["y"]) != 2 or shapes["y"][1] < config["pooled_projection_dim"]:
            raise UnsupportedError(
                f"the pooled conditioning has the shape {list(shapes['y'])}; this checkpoint needs"
                f" [batch, {config['pooled_projection_dim']}]: is it from CLIP-L?"
            )
        return tokens

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
        self, model: nn.Module, x: Tensor, timestep: Tensor, prompts: Prompts, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        config, device = m.config, prompts.text.device
        patch: Grid = (config.patch_size_t, config.patch_size, config.patch_size)
        grid: Grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))  # type: ignore[assignment]
        plan = context.plan((prod(grid), prompts.text.shape[1]), config.num_attention_heads)
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        by = _modulation(m, timestep, prompts, grid, plan.stream_ranges(context.rank))
        text = hunyuan.refined_text(m, timestep, prompts)[:, t0:t1]
        weight = m.x_embedder.proj.weight.flatten(1)
        video = F.linear(read_tokens(x, v0, v1, patch, weight), weight, m.x_embedder.proj.bias)
        table = two_stream.rope_with_text(hunyuan.positions(v0, v1, grid, device), t1 - t0)
        video = two_stream.run_blocks(m, video, text, by, table, context, plan)
        write_tokens(two_stream.head(m, video, by), out, v0, v1, patch)


def _modulation(m: Any, timestep: Tensor, prompts: Prompts, grid: Grid, ranges: tuple[Range, ...]) -> Modulation:
    """For a rank's ranges of video and text.

    A given first frame has a timestep of its own, and the guidance, too, as in ComfyUI (diffusers leaves it out). In
    the single-stream blocks ComfyUI (0.33) counts the frame's tokens along the joint sequence, text first: all of the
    text, with its padding, goes by the frame's timestep, and as many of the frame's last tokens do not.
    """
    pooled, guidance = prompts.others["y"], prompts.others.get("guidance")
    vector = two_stream.modulation(m.time_text_embed, timestep, pooled, guidance)
    if "guiding_frame_index" not in prompts.others:
        return Modulation.uniform(vector)
    given = prompts.others["guiding_frame_index"].float().expand(len(timestep))
    first = two_stream.modulation(m.time_text_embed, given, pooled, guidance)
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
