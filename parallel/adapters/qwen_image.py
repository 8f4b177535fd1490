"""Qwen-Image (https://arxiv.org/abs/2508.02324): text to picture, Edit with its reference pictures, Layered.

Dual-stream blocks throughout. Each picture's positions are centred on 0, and the text's follow where the larger half
of the picture's ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import two_stream
from .base import Adapter, Piece, StepContext
from .inputs import alike, normal, require_known, require_latent, require_one_time_each, require_text
from .patches import Grid, read_tokens, write_tokens
from .references import PREFIX, beside, method_of, references_of
from .two_stream import HEAD_DIM, Modulation, Shapes, add_gated, by_rows, modulate

ROPE_AXES = (16, 56, 56)
ROPE_THETA = 10000.0
_EPS = 1e-6
_PATCH: Grid = (1, 2, 2)

_DEFAULTS = {
    "in_channels": 64, "out_channels": 16, "num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584,
    "zero_cond_t": False, "use_additional_t_cond": False,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "patch_size": 2, "attention_head_dim": HEAD_DIM, "axes_dims_rope": list(ROPE_AXES), "guidance_embeds": False,
}  # fmt: skip

_MARKERS = ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.txt_mod.1.weight")
_CLEAN_REFERENCES = "__index_timestep_zero__"
"""An empty tensor by which files of Edit 2511 say that references have the timestep 0."""
_LAYERED = "time_text_embed.addition_t_embedding.weight"
_MAGE_FLOW = (2560, 128)
"""Width of the text and of the output by which ComfyUI tells this relative."""

_METHODS = ("index", "index_timestep_zero", "negative_index", "offset")
"""Ways to place the references."""


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Samples of a batch that can run together: their texts have the same valid tokens."""

    rows: slice
    """The samples' places in the batch."""
    text: Tensor
    """[b, L, C], valid tokens only."""
    places: Tensor
    """[L]: of these tokens in the text with its padding."""
    references: list[Tensor]
    """[b, C, T, H, W] each."""
    method: str
    """Empty where the model's own is meant."""


class QwenImageAdapter(Adapter):
    family: ClassVar[str] = "qwen_image"
    title: ClassVar[str] = "Qwen-Image, Edit, Layered"
    makes: ClassVar[tuple[str, ...]] = ("T2I", "edit")
    verified: ClassVar[str] = "ComfyUI with a patched detection, diffusers"
    not_quantised: ClassVar[tuple[str, ...]] = (
        "img_in", "txt_in", "time_text_embed", "img_mod", "txt_mod", "norm_out", "proj_out",
    )  # fmt: skip

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "QwenImageTransformer2DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, _FIXED)
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
            return config | {"out_channels": config["out_channels"] or config["in_channels"]}
        shapes = {name: info.shape for name, info in source.tensors.items()}
        try:
            width, out = shapes["txt_norm.weight"][0], shapes["proj_out.weight"][0]
            if (width, out) == _MAGE_FLOW:
                raise UnsupportedError(f"{source.path}: Mage-Flow is not supported yet (its text has {width} channels)")
            return {
                "in_channels": shapes["img_in.weight"][1],
                "out_channels": out // prod(_PATCH),
                "num_layers": two_stream.count(shapes, "transformer_blocks"),
                "num_attention_heads": shapes["img_in.weight"][0] // HEAD_DIM,
                "joint_attention_dim": width,
                "zero_cond_t": _CLEAN_REFERENCES in shapes,
                "use_additional_t_cond": _LAYERED in shapes,
            }
        except KeyError as error:
            raise CheckpointError(f"{source.path} looks like Qwen-Image, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        return [] if name == _CLEAN_REFERENCES else [Piece(name)]

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d = config["num_attention_heads"] * HEAD_DIM
        linear: Shapes = {
            "time_text_embed.timestep_embedder.linear_1": (d, 256),
            "time_text_embed.timestep_embedder.linear_2": (d, d),
            "img_in": (d, config["in_channels"]),
            "txt_in": (d, config["joint_attention_dim"]),
            "norm_out.linear": (2 * d, d),
            "proj_out": (config["out_channels"] * prod(_PATCH), d),
        }
        others: Shapes = {"txt_norm.weight": (config["joint_attention_dim"],)}
        others |= {_CLEAN_REFERENCES: (0,)} if config["zero_cond_t"] else {}
        others |= {_LAYERED: (2, d)} if config["use_additional_t_cond"] else {}
        layers = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
        for i in range(config["num_layers"]):
            block = f"transformer_blocks.{i}"
            linear |= {f"{block}.attn.{layer}": (d, d) for layer in layers}
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                others[f"{block}.attn.{norm}.weight"] = (HEAD_DIM,)
            for stream in ("img", "txt"):
                linear[f"{block}.{stream}_mod.1"] = (6 * d, d)
                linear |= {f"{block}.{stream}_mlp.net.0.proj": (4 * d, d), f"{block}.{stream}_mlp.net.2": (d, 4 * d)}
        return two_stream.with_biases(linear) | others

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        references = [name for name in inputs if name.startswith(PREFIX)]
        require_known("Qwen-Image", inputs, ("attention_mask", "ref_latents_method", *references), ("context",))
        channels = config["in_channels"] // prod(_PATCH)
        x = inputs["x"]
        require_latent("Qwen-Image", x, channels)
        for name in references:
            require_latent(f"Qwen-Image ({name})", inputs[name], channels)
            if len(inputs[name]) != len(x):
                raise UnsupportedError(f"{name} has {len(inputs[name])} pictures; needed is one for each of {len(x)}")
        require_text(inputs, config["joint_attention_dim"], "Qwen2.5-VL")
        require_one_time_each("Qwen-Image", inputs["timestep"])
        if (method := method_of(inputs)) not in ("", *_METHODS):
            raise UnsupportedError(
                f"Qwen-Image (SP) cannot use the reference method {method}; choose {', '.join(_METHODS)}"
            )
        return prod(_grid(x))

    def output_shape(self, config: Mapping[str, Any], x_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x_shape)

    def prepare(self, conditioning: Mapping[str, Tensor]) -> list[_Prompts]:
        text = conditioning["context"]
        references = references_of(conditioning)

        def prompts(rows: slice, keep: Tensor) -> _Prompts:
            own = [reference[rows] if len(reference) > 1 else reference for reference in references]
            return _Prompts(rows, text[rows, keep], keep.nonzero().flatten(), own, method_of(conditioning))

        return [prompts(rows, keep) for rows, keep in alike(text, conditioning.get("attention_mask"))]

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        random, channels = normal(dtype), config["in_channels"] // prod(_PATCH)
        return {
            "x": random(1, channels, 1, 4, 2 * world_size + 1),
            "timestep": torch.tensor([0.5]),
            "context": random(1, 7, config["joint_attention_dim"]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            f"{PREFIX}0": random(1, channels, 1, 3, 4),
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
        text, method = prompts.text, prompts.method or _own_method(m.config)
        pictures = [x, *prompts.references]
        grids = [_grid(picture) for picture in pictures]
        plan = context.plan((*map(prod, grids), text.shape[1]), m.config.num_attention_heads)
        *parts, (t0, t1) = plan.stream_ranges(context.rank)

        by = _modulation(m, timestep, text.dtype, parts, clean=method == "index_timestep_zero")
        tokens = [
            read_tokens(_whole_patches(picture), *part, _PATCH, text)
            for picture, part in zip(pictures, parts, strict=True)
        ]
        image = m.img_in(torch.cat(tokens, dim=1))
        normed = F.rms_norm(text[:, t0:t1], text.shape[-1:], m.txt_norm.weight, _EPS)
        positions = [
            _positions(*part, grid, offset, text.device)
            for part, grid, offset in zip(parts, grids, [(0, 0, 0), *_offsets(prompts.references, method)], strict=True)
        ]
        begin = max(_tokens(size) // 2 for size in x.shape[3:])
        positions.append((begin + prompts.places[t0:t1]).expand(3, -1))
        cos, sin = rope(torch.cat(positions, dim=1).unbind(), ROPE_AXES, ROPE_THETA)
        table = cos.to(text.dtype), sin.to(text.dtype)  # ComfyUI rounds them so

        def each_block(image: Tensor, text: Tensor) -> Blocks:
            attend, run = context.attention(plan), context.block(_block)
            for block in m.transformer_blocks:
                context.enter_block(plan)
                image, text = run(block, image, text, by, table, attend)
                yield image

        def probe() -> Tensor:
            return modulate(image, by_rows(m.transformer_blocks[0].img_mod, by.image), 0)

        image = context.run_blocks(plan, image, each_block(image, m.txt_in(normed)), probe)
        start, stop = parts[0]  # the references are context: no prediction is made for them
        head = m.proj_out(m.norm_out(image[:, : stop - start], _embedded_times(m, timestep, text.dtype)))
        write_tokens(head, out, start, stop, _PATCH)


def _own_method(config: Any) -> str:
    if config.use_additional_t_cond:
        return "negative_index"
    return "index_timestep_zero" if config.zero_cond_t else "index"


def _tokens(size: int) -> int:
    """Along a height or width; an incomplete patch counts."""
    return -(-size // 2)


def _grid(x: Tensor) -> Grid:
    return x.shape[2], _tokens(x.shape[3]), _tokens(x.shape[4])


def _whole_patches(x: Tensor) -> Tensor:
    """ComfyUI wraps odd sizes around to whole patches."""
    if (x.shape[3] | x.shape[4]) % 2:
        x = F.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2, 0, 0), mode="circular")
    return x


def _offsets(references: list[Tensor], method: str) -> list[Grid]:
    """Where each reference lies beside its centre: plane, and rows and columns in tokens.

    `offset`: together on one plane. The other methods give each a plane of its own.
    """
    if method != "offset":
        sign = -1 if method == "negative_index" else 1
        return [(sign * i, 0, 0) for i in range(1, len(references) + 1)]
    places = beside((reference.shape[3], reference.shape[4]) for reference in references)
    return [(1, _tokens(row), _tokens(column)) for row, column in places]


def _positions(start: int, stop: int, grid: Grid, offset: Grid, device: torch.device) -> Tensor:
    """[3, stop − start]: plane, row and column of tokens [start, stop). Of several planes the first is always 0."""
    frames, height, width = grid
    index = torch.arange(start, stop, device=device)
    plane = index // (height * width) if frames > 1 else torch.full_like(index, offset[0])
    row, column = index // width % height + offset[1], index % width + offset[2]
    return torch.stack([plane, row - height // 2, column - width // 2])


def _embedded_times(m: Any, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """timestep [B], 0 … 1, fp32 → [B, hidden]. Layered's pictures are all of its first kind."""
    kind = torch.zeros_like(timestep, dtype=torch.long) if m.config.use_additional_t_cond else None
    return m.time_text_embed(timestep, timestep.new_empty(0, dtype=dtype), kind)


def _modulation(
    m: Any, timestep: Tensor, dtype: torch.dtype, parts: list[tuple[int, int]], *, clean: bool
) -> Modulation:
    """For this rank's rows of the picture and its references; the latter have the timestep 0 if they are `clean`."""
    vector = _embedded_times(m, timestep, dtype)
    uniform = Modulation.uniform(vector)
    (start, stop), *references = parts
    if not clean or not references:
        return uniform
    rows = sum(last - first for first, last in references)
    zero = _embedded_times(m, torch.zeros_like(timestep), dtype)
    return Modulation(two_stream.vectors([(stop - start, vector), (rows, zero)]), uniform.text, uniform.joint)


def _block(
    block: Any, image: Tensor, text: Tensor, by: Modulation, table: Rope, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """image [B, n, hidden], text [B, m, hidden] → the same; m may be 0 on this rank, and then costs nothing."""
    attn, count = block.attn, image.shape[1]
    of_image = by_rows(block.img_mod, by.image)
    of_text = by_rows(block.txt_mod, by.text) if text.shape[1] else ()
    x = modulate(image, of_image, 0)
    parts = two_stream.qkv(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), _EPS)
    if of_text:
        x = modulate(text, of_text, 0)
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        added = two_stream.qkv(x, layers, (attn.norm_added_q, attn.norm_added_k), _EPS)
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, added, strict=True)]
    q, k, v = parts
    out = attend(rotate(q, table), rotate(k, table), v).flatten(2)
    image = add_gated(image, attn.to_out[0](out[:, :count]), of_image, 2)
    image = add_gated(image, block.img_mlp(modulate(image, of_image, 3)), of_image, 5)
    if of_text:
        text = add_gated(text, attn.to_add_out(out[:, count:]), of_text, 2)
        text = add_gated(text, block.txt_mlp(modulate(text, of_text, 3)), of_text, 5)
    return image, text
