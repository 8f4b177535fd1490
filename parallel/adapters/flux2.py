"""FLUX.2: dev and Klein (https://github.com/black-forest-labs/flux2), with any number of reference pictures.

Dual-, then single-stream blocks as FLUX.1's, but all blocks of a kind share one modulation, which a step computes once;
no layer has a bias, MLPs are gated by SiLU, and a token is one element of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.rope import Rope, rope, rotate
from ..cache.blocks import Blocks
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedError
from . import two_stream
from .base import Adapter, Piece, StepContext
from .inputs import normal, require_known, require_one_time_each, require_text
from .patches import Grid, read_tokens, write_tokens
from .references import PREFIX, beside, diagonal, method_of, references_of
from .two_stream import HEAD_DIM, ByRows, Modulation, Shapes, add_gated, by_rows, modulate

ROPE_AXES = (32, 32, 32, 32)
"""Plane, row and column of pictures, and the place in the text."""
ROPE_THETA = 2000.0
_PATCH: Grid = (1, 1, 1)
_MLP_RATIO = 3
_PLANES_APART = 10
"""Of the picture and its references, and of these from each other."""

_DEFAULTS = {
    "in_channels": 128, "out_channels": None, "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48,
    "joint_attention_dim": 15360, "guidance_embeds": True,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "patch_size": 1, "attention_head_dim": HEAD_DIM, "axes_dims_rope": list(ROPE_AXES), "rope_theta": 2000,
    "mlp_ratio": 3.0, "eps": 1e-6, "timestep_guidance_channels": 256,
}  # fmt: skip

_MARKERS = (
    "img_in.weight", "double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight",
    "double_blocks.0.img_attn.qkv.weight",
)  # fmt: skip

# ComfyUI's names → diffusers' names, where they are not FLUX.1's.
_RENAMED = [
    (r"^img_in$", "x_embedder"),
    (r"^txt_in$", "context_embedder"),
    (r"^time_in\.", "time_guidance_embed.timestep_embedder."),
    (r"^guidance_in\.", "time_guidance_embed.guidance_embedder."),
    (r"^((?:double|single)_stream_modulation\w*)\.lin$", r"\1.linear"),
    (r"\.img_mlp\.0$", ".ff.linear_in"),
    (r"\.img_mlp\.2$", ".ff.linear_out"),
    (r"\.txt_mlp\.0$", ".ff_context.linear_in"),
    (r"\.txt_mlp\.2$", ".ff_context.linear_out"),
    (r"\.linear1$", ".attn.to_qkv_mlp_proj"),
    (r"\.linear2$", ".attn.to_out"),
    *two_stream.RENAMED,
]

_METHODS = ("index", "index_timestep_zero", "offset", "uxo")
"""Ways to place the references; the first one is the default."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: Tensor
    guidance: Tensor | None
    references: list[Tensor]
    """[B, C, H, W] each."""
    method: str


@dataclass(frozen=True, slots=True)
class _Shared:
    """What modulates this rank's rows in every block of a kind."""

    image: ByRows
    text: ByRows
    joint: ByRows
    """In the single-stream blocks: image rows, then text rows."""


class Flux2Adapter(Adapter):
    family: ClassVar[str] = "flux2"
    title: ClassVar[str] = "FLUX.2 dev, Klein"
    makes: ClassVar[tuple[str, ...]] = ("T2I", "edit")
    verified: ClassVar[str] = "ComfyUI, diffusers"
    not_quantised: ClassVar[tuple[str, ...]] = (
        "img_in", "txt_in", "time_in", "guidance_in", "*_stream_modulation*", "final_layer",
    )  # fmt: skip

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "Flux2Transformer2DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        if source.config is not None:
            two_stream.require(source, _FIXED)
            config = _DEFAULTS | {key: value for key, value in source.config.items() if not key.startswith("_")}
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
            }
        except KeyError as error:
            raise CheckpointError(f"{source.path} looks like FLUX.2, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        stem, _, leaf = name.rpartition(".")
        if stem.endswith("_norm"):  # black-forest-labs' files say `scale`
            leaf = "weight"
        if stem.endswith(".linear1"):  # fused in diffusers, too
            return [Piece(f"{two_stream.rename(stem, _RENAMED)}.{leaf}")]
        return two_stream.pieces(f"{stem}.{leaf}", shape, config["num_attention_heads"] * HEAD_DIM, _RENAMED)

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d = config["num_attention_heads"] * HEAD_DIM
        mlp = _MLP_RATIO * d
        shapes: Shapes = {
            "img_in": (d, config["in_channels"]),
            "txt_in": (d, config["joint_attention_dim"]),
            "double_stream_modulation_img.lin": (6 * d, d),
            "double_stream_modulation_txt.lin": (6 * d, d),
            "single_stream_modulation.lin": (3 * d, d),
            "final_layer.adaLN_modulation.1": (2 * d, d),
            "final_layer.linear": (config["out_channels"], d),
        }
        for embedder in ("time_in", *(["guidance_in"] if config["guidance_embeds"] else [])):
            shapes |= {f"{embedder}.in_layer": (d, 256), f"{embedder}.out_layer": (d, d)}
        for i in range(config["num_layers"]):
            for stream in ("img", "txt"):
                block = f"double_blocks.{i}.{stream}"
                shapes |= {f"{block}_attn.qkv": (3 * d, d), f"{block}_attn.proj": (d, d)}
                shapes |= {f"{block}_mlp.0": (2 * mlp, d), f"{block}_mlp.2": (d, mlp)}
                shapes |= {f"{block}_attn.norm.{part}_norm": (HEAD_DIM,) for part in ("query", "key")}
        for i in range(config["num_single_layers"]):
            block = f"single_blocks.{i}"
            shapes |= {f"{block}.linear1": (3 * d + 2 * mlp, d), f"{block}.linear2": (d, d + mlp)}
            shapes |= {f"{block}.norm.{part}_norm": (HEAD_DIM,) for part in ("query", "key")}
        return {f"{name}.weight": shape for name, shape in shapes.items()}

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        references = {name: tuple(tensor.shape) for name, tensor in inputs.items() if name.startswith(PREFIX)}
        # ComfyUI passes a guidance to models without an embedder for it, and hands on a pooled text; neither is used.
        require_known("FLUX.2", inputs, ("guidance", "y", "ref_latents_method", *references), ("context",))
        x, channels = tuple(inputs["x"].shape), config["in_channels"]
        if len(x) != 4 or x[1] != channels:
            raise UnsupportedError(
                f"FLUX.2 needs a latent of shape [batch, {channels}, height, width]; it is {list(x)}"
            )
        for name, shape in references.items():
            if len(shape) != 4 or shape[:2] != x[:2]:
                raise UnsupportedError(
                    f"a reference latent needs the shape [{x[0]}, {x[1]}, height, width] for this latent;"
                    f" {name} is {list(shape)}"
                )
        require_text(inputs, config["joint_attention_dim"], "this model's text encoder")
        require_one_time_each("FLUX.2", inputs["timestep"])
        if (method := method_of(inputs) or _METHODS[0]) not in _METHODS:
            raise UnsupportedError(
                f"FLUX.2 (SP) cannot use the reference method {method}; choose {', '.join(_METHODS)}"
            )
        return prod(x[2:])

    def prepare(self, conditioning: Mapping[str, Tensor]) -> _Prompt:
        return _Prompt(
            text=conditioning["context"],  # FLUX.2 attends to its padding: nothing may be trimmed
            guidance=conditioning.get("guidance"),
            references=references_of(conditioning),
            method=method_of(conditioning) or _METHODS[0],
        )

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        random, channels = normal(dtype), config["in_channels"]
        return {
            "x": random(1, channels, 2, 2 * world_size + 1),
            "timestep": torch.tensor([0.5]),
            "context": random(1, 7, config["joint_attention_dim"]),
            "guidance": torch.tensor([3.5]).to(dtype),
            f"{PREFIX}0": random(1, channels, 3, 2),
        }

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        text = prepared.text
        offsets = [(0, 0, 0), *_offsets(prepared.references, prepared.method, x)]
        pictures = [picture[:, :, None] for picture in (x, *prepared.references)]
        grids: list[Grid] = [(1, picture.shape[3], picture.shape[4]) for picture in pictures]
        plan = context.plan((*map(prod, grids), text.shape[1]), m.config.num_attention_heads)
        *parts, (t0, t1) = plan.stream_ranges(context.rank)

        times = _modulation(m, timestep, prepared, parts, t1 - t0)
        by = _Shared(
            by_rows(m.double_stream_modulation_img, times.image),
            by_rows(m.double_stream_modulation_txt, times.text),
            by_rows(m.single_stream_modulation, times.joint),
        )
        tokens = [read_tokens(picture, *part, _PATCH, text) for picture, part in zip(pictures, parts, strict=True)]
        image, text = m.x_embedder(torch.cat(tokens, dim=1)), m.context_embedder(text[:, t0:t1])
        positions = [
            _positions(*part, grid, offset, text.device)
            for part, grid, offset in zip(parts, grids, offsets, strict=True)
        ]
        table = rope(torch.cat([*positions, _places(t0, t1, text.device)], dim=1).unbind(), ROPE_AXES, ROPE_THETA)

        def each_block(image: Tensor, text: Tensor) -> Blocks:
            attend, dual_stream_block = context.attention(plan), context.block(_dual_stream_block)
            for block in m.transformer_blocks:
                context.enter_block(plan)
                image, text = dual_stream_block(block, image, text, by.image, by.text, table, attend)
                yield image
            single_stream_block = context.block(_single_stream_block)
            hidden = torch.cat([two_stream.finite(image), text], dim=1)
            for block in m.single_transformer_blocks:
                context.enter_block(plan)
                hidden = single_stream_block(block, hidden, by.joint, table, attend)
                yield hidden[:, : image.shape[1]]

        image = context.run_blocks(plan, image, each_block(image, text), lambda: modulate(image, by.image, 0))
        start, stop = parts[0]  # the references are context: no prediction is made for them
        write_tokens(two_stream.head(m, image[:, : stop - start], times), out[:, :, None], start, stop, _PATCH)


def _offsets(references: list[Tensor], method: str, x: Tensor) -> list[Grid]:
    """Plane, row and column of each reference's corner.

    `index`, and `index_timestep_zero`: each alone on a plane of its own. `uxo`: on the picture's plane. `offset`:
    together on the one beside it.
    """
    if method.startswith("index"):
        return [(_PLANES_APART * i, 0, 0) for i in range(1, len(references) + 1)]
    sizes = [(reference.shape[2], reference.shape[3]) for reference in references]
    places = diagonal(sizes, (x.shape[2], x.shape[3])) if method == "uxo" else beside(sizes)
    return [(int(method == "offset"), row, column) for row, column in places]


def _positions(start: int, stop: int, grid: Grid, offset: Grid, device: torch.device) -> Tensor:
    """[4, stop − start]: of a picture's tokens [start, stop)."""
    index = torch.arange(start, stop, device=device)
    plane, row, column = offset
    zero = torch.zeros_like(index)
    return torch.stack([zero + plane, row + index // grid[2], column + index % grid[2], zero])


def _places(start: int, stop: int, device: torch.device) -> Tensor:
    """[4, stop − start]: of text tokens [start, stop)."""
    index = torch.arange(start, stop, device=device)
    zero = torch.zeros_like(index)
    return torch.stack([zero, zero, zero, index])


def _embedded_times(embed: Any, timestep: Tensor, prompt: _Prompt) -> Tensor:
    """timestep [B], 0 … 1, fp32 → [B, hidden].

    The guidance, [B] or [1] in the dtype in which ComfyUI hands it over, is scaled in that: 6.0 in bf16 becomes 6016,
    and that is what ComfyUI's results show.
    """
    dtype, guidance = prompt.text.dtype, prompt.guidance
    vector = embed.timestep_embedder(embed.time_proj(timestep * 1000).to(dtype))
    if embed.guidance_embedder is not None and guidance is not None:
        scaled = (guidance * 1000).float().expand(len(vector))
        vector = vector + embed.guidance_embedder(embed.time_proj(scaled).to(dtype))
    return vector


def _modulation(m: Any, timestep: Tensor, prompt: _Prompt, parts: list[tuple[int, int]], text: int) -> Modulation:
    """For this rank's rows of the picture, its references and `text` rows of text.

    By the method `index_timestep_zero` the references have the timestep 0.
    """
    vector = _embedded_times(m.time_guidance_embed, timestep, prompt)
    uniform = Modulation.uniform(vector)
    if prompt.method != "index_timestep_zero" or not prompt.references:
        return uniform
    zero = _embedded_times(m.time_guidance_embed, torch.zeros_like(timestep), prompt)
    own, *others = (stop - start for start, stop in parts)
    rows = [(own, vector), (sum(others), zero)]
    return Modulation(two_stream.vectors(rows), uniform.text, two_stream.vectors([*rows, (text, vector)]))


def _dual_stream_block(
    block: Any, image: Tensor, text: Tensor, of_image: ByRows, of_text: ByRows, table: Rope, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """image [B, n, hidden], text [B, m, hidden] → the same; m may be 0 on this rank, and then costs nothing."""
    attn, count, has_text = block.attn, image.shape[1], bool(text.shape[1])
    x = modulate(image, of_image, 0)
    parts = two_stream.qkv(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), None)
    if has_text:
        x = modulate(text, of_text, 0)
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        added = two_stream.qkv(x, layers, (attn.norm_added_q, attn.norm_added_k), None)
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, added, strict=True)]
    q, k, v = parts
    out = attend(rotate(q, table), rotate(k, table), v).flatten(2)
    image = add_gated(image, attn.to_out[0](out[:, :count]), of_image, 2)
    image = add_gated(image, block.ff(modulate(image, of_image, 3)), of_image, 5)
    if has_text:
        text = add_gated(text, attn.to_add_out(out[:, count:]), of_text, 2)
        text = add_gated(text, block.ff_context(modulate(text, of_text, 3)), of_text, 5)
    return image, two_stream.finite(text)


def _single_stream_block(block: Any, hidden: Tensor, by: ByRows, table: Rope, attend: JointAttention) -> Tensor:
    """hidden [B, S_r, hidden]: both streams in one; only RoPE tells them apart."""
    attn, width = block.attn, hidden.shape[2]
    fused = attn.to_qkv_mlp_proj(modulate(hidden, by, 0))
    q, k, v = fused[..., : 3 * width].chunk(3, dim=2)
    q, k, v = two_stream.heads(q, attn.norm_q), two_stream.heads(k, attn.norm_k), two_stream.heads(v)
    # The MLP's activation does not need the attention: it runs while tokens and heads are exchanged.
    gated = fused[..., 3 * width :]
    out, mlp = attend.with_work(rotate(q, table), rotate(k, table), v, lambda: attn.mlp_act_fn(gated))
    return two_stream.finite(add_gated(hidden, attn.to_out(torch.cat([out.flatten(2), mlp], dim=2)), by, 2))
