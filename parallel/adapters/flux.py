"""FLUX.1: dev, schnell, Kontext, and the variants with concatenated channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.rope import rope
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import two_stream
from .base import Adapter, Piece, StepContext
from .patches import Grid, read_tokens, write_tokens
from .references import PREFIX, beside, diagonal, method_of, references_of
from .two_stream import HEAD_DIM, Shapes

ROPE_AXES = (16, 56, 56)
ROPE_THETA = 10000.0
_PATCH: Grid = (1, 2, 2)

_MARKERS = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.qkv.weight")
_DEFAULTS = {
    "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": False,
}  # fmt: skip
_RENAMED = [(r"^img_in$", "x_embedder"), (r"^txt_in$", "context_embedder"), *two_stream.RENAMED]

_METHODS = ("offset", "index", "uxo")
"""Ways to place the references; the first one is the default."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: Tensor
    pooled: Tensor | None
    guidance: Tensor | None
    references: list[Tensor]
    """[B, C, H, W] each."""
    method: str


class FluxAdapter(Adapter):
    family: ClassVar[str] = "flux"
    title: ClassVar[str] = "FLUX.1 dev, schnell, Kontext"
    makes: ClassVar[tuple[str, ...]] = ("T2I", "edit")
    read_directly: ClassVar[tuple[str, ...]] = ("x_embedder",)
    not_quantised: ClassVar[tuple[str, ...]] = two_stream.NOT_QUANTISED

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS) and "double_blocks.0.img_mlp.2.weight" in tensors

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "FluxTransformer2DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            two_stream.require(source, {"attention_head_dim": HEAD_DIM, "axes_dims_rope": list(ROPE_AXES)})
            return config | {"out_channels": config["out_channels"] or config["in_channels"]}
        shapes = {name: info.shape for name, info in source.tensors.items()}
        try:
            return {
                "in_channels": shapes["img_in.weight"][1],
                "out_channels": shapes["final_layer.linear.weight"][0],
                "num_attention_heads": shapes["img_in.weight"][0] // HEAD_DIM,
                "num_layers": two_stream.count(shapes, "double_blocks"),
                "num_single_layers": two_stream.count(shapes, "single_blocks"),
                "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
                "joint_attention_dim": shapes["txt_in.weight"][1],
                "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            }
        except KeyError as error:
            raise CheckpointError(f"{source.path} looks like FLUX.1, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        name = f"{name.removesuffix('.scale')}.weight" if name.endswith("_norm.scale") else name
        return two_stream.pieces(name, shape, config["num_attention_heads"] * HEAD_DIM, _RENAMED)

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d = config["num_attention_heads"] * HEAD_DIM
        linear, norms = two_stream.block_tensors(config)
        linear |= {"img_in": (d, config["in_channels"]), "txt_in": (d, config["joint_attention_dim"])}
        linear["final_layer.linear"] = (config["out_channels"], d)
        return two_stream.with_biases(linear) | {f"{name}.weight": (size,) for name, size in norms.items()}

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        references = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
        known = {"x", "timestep", "context", "y", "guidance", "ref_latents_method"}
        if unknown := sorted(set(shapes) - known - set(references)):
            raise UnsupportedError(f"FLUX.1 (SP) cannot use the input {', '.join(unknown)} yet")
        if "context" not in shapes:
            raise UnsupportedError("FLUX.1 needs a text encoder's conditioning; the conditioning has none")
        x, context, channels = shapes["x"], shapes["context"], config["in_channels"] // prod(_PATCH)
        if len(x) != 4 or x[1] != channels:
            raise UnsupportedError(
                f"FLUX.1 needs a latent of shape [batch, {channels}, height, width]; it is {list(x)}"
            )
        if len(context) != 3 or context[2] != config["joint_attention_dim"]:
            raise UnsupportedError(
                f"the text conditioning has the shape {list(context)}; this checkpoint needs"
                f" [batch, tokens, {config['joint_attention_dim']}]: is it from FLUX's text encoder?"
            )
        for name, shape in references.items():
            if len(shape) != 4 or shape[:2] != x[:2]:
                raise UnsupportedError(
                    f"a reference latent needs the shape [{x[0]}, {x[1]}, height, width] for this latent;"
                    f" {name} is {list(shape)}"
                )
        method = method_of(inputs) or _METHODS[0]
        if method not in _METHODS:
            raise UnsupportedError(
                f"FLUX.1 (SP) cannot use the reference method {method}; choose {', '.join(_METHODS)}"
            )
        return prod(-(-size // 2) for size in x[2:])

    def output_shape(self, config: Mapping[str, Any], x_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (x_shape[0], config["out_channels"] // prod(_PATCH), *x_shape[2:])

    def prepare(self, conditioning: Mapping[str, Tensor]) -> _Prompt:
        return _Prompt(
            text=conditioning["context"],  # FLUX attends to its padding: nothing may be trimmed
            pooled=conditioning.get("y"),
            guidance=conditioning.get("guidance"),
            references=references_of(conditioning),
            method=method_of(conditioning) or _METHODS[0],
        )

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        return {
            "x": random(1, config["in_channels"] // prod(_PATCH), 4, 2 * world_size + 1),
            "timestep": torch.tensor([0.5]),
            "context": random(1, 7, config["joint_attention_dim"]),
            "y": random(1, config["pooled_projection_dim"]),
            "guidance": torch.tensor([3.5]).to(dtype),
            f"{PREFIX}0": random(1, config["in_channels"] // prod(_PATCH), 3, 4),
        }

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        text, config = prepared.text, m.config
        offsets = [(0, 0, 0), *_offsets(prepared.references, prepared.method, x)]
        pictures = [_whole_patches(picture) for picture in (x, *prepared.references)]
        grids: list[Grid] = [(1, picture.shape[3] // 2, picture.shape[4] // 2) for picture in pictures]
        plan = context.plan((*map(prod, grids), text.shape[1]), config.num_attention_heads)
        *parts, (t0, t1) = plan.stream_ranges(context.rank)

        pooled = prepared.pooled
        if pooled is None:
            pooled = text.new_zeros(text.shape[0], config.pooled_projection_dim)
        vector = two_stream.modulation(m.time_text_embed, timestep * 1000, pooled, prepared.guidance)
        by = two_stream.Modulation.uniform(vector)
        tokens = [
            read_tokens(picture, *part, _PATCH, m.x_embedder.weight)
            for picture, part in zip(pictures, parts, strict=True)
        ]
        image = m.x_embedder(torch.cat(tokens, dim=1))
        text = m.context_embedder(text[:, t0:t1])
        positions = [
            _positions(*part, grid, offset, text.device)
            for part, grid, offset in zip(parts, grids, offsets, strict=True)
        ]
        table = rope(torch.cat(positions, dim=1).unbind(), ROPE_AXES, ROPE_THETA)
        image = two_stream.run_blocks(m, image, text, by, two_stream.rope_with_text(table, t1 - t0), context, plan)
        start, stop = parts[0]  # the references are context: no prediction is made for them
        write_tokens(two_stream.head(m, image[:, : stop - start], by), out[:, :, None], start, stop, _PATCH)


def _whole_patches(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, C, 1, H, W]; ComfyUI wraps odd sizes around to whole patches."""
    if (x.shape[2] | x.shape[3]) % 2:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="circular")
    return x[:, :, None]


def _offsets(references: Sequence[Tensor], method: str, x: Tensor) -> list[Grid]:
    """Where each reference lies on the axes of the position embedding, in tokens.

    `index`: each alone on a plane of its own. `uxo`: on the picture's plane. `offset`: together on the one beside it.
    """
    if method == "index":
        return [(i, 0, 0) for i in range(1, len(references) + 1)]
    sizes = [(reference.shape[2], reference.shape[3]) for reference in references]
    if method == "uxo":
        places = diagonal(sizes, (x.shape[2] + x.shape[2] % 2, x.shape[3] + x.shape[3] % 2))
    else:
        places = beside(sizes)
    return [(int(method == "offset"), (row + 1) // 2, (column + 1) // 2) for row, column in places]


def _positions(start: int, stop: int, grid: Grid, offset: Grid, device: torch.device) -> Tensor:
    """[3, stop − start]: plane, row and column of tokens [start, stop)."""
    index = torch.arange(start, stop, device=device)
    plane, row, column = offset
    return torch.stack([torch.full_like(index, plane), row + index // grid[2], column + index % grid[2]])
