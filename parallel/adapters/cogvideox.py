"""CogVideoX 1.0 and 1.5 (https://arxiv.org/abs/2408.06072): text-to-video, and what gets further channels of latent.

Text and video are one sequence with one set of weights; only the modulation tells them apart. The network attends to
the padding of the text, so nothing may be trimmed.

Positions are a rotary table, or are added to the tokens. ComfyUI (0.33) goes by the file: learned positions are added
where it has them, and all else is rotated, in 1.0 by coordinates times the spatial interpolation scale. It cannot load
a diffusers folder; there everything is as diffusers has it: sines and cosines added for 2B, rotation by the grid's
coordinates for 5B, both for 5B image-to-video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from ..plan import Range
from . import two_stream
from .base import Adapter, Piece, StepContext
from .patches import Grid, read_tokens, write_tokens
from .two_stream import Shapes, rename

HEAD_DIM = 64
ROPE_AXES = (16, 24, 24)
THETA = 10000.0

_MARKERS = ("blocks.0.norm1.linear.weight", "blocks.0.ff_proj.weight", "patch_embed.text_proj.weight")
_POSITIONS = "patch_embed.pos_embedding"

# Values that a diffusers config.json may leave out, and ComfyUI's for a single file.
_DEFAULTS = {
    "num_attention_heads": 30, "in_channels": 16, "out_channels": 16, "time_embed_dim": 512, "ofs_embed_dim": None,
    "text_embed_dim": 4096, "num_layers": 30, "sample_width": 90, "sample_height": 60, "patch_size": 2,
    "patch_size_t": None, "max_text_seq_length": 226, "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0, "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}  # fmt: skip

# Values of a diffusers config.json that the mathematics here takes for granted.
_FIXED = {
    "attention_head_dim": HEAD_DIM,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
}

# ComfyUI's names → diffusers' names.
_RENAMED = [
    (r"^(time|ofs)_embedding_linear_", r"\1_embedding.linear_"),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.([qkv])$", r".attn1.to_\1"),
    (r"\.norm_([qk])$", r".attn1.norm_\1"),
    (r"\.attn_out$", ".attn1.to_out.0"),
    (r"\.ff_proj$", ".ff.net.0.proj"),
    (r"\.ff_out$", ".ff.net.2"),
]


class CogVideoXAdapter(Adapter):
    family: ClassVar[str] = "cogvideox"
    title: ClassVar[str] = "CogVideoX 2B, 5B, 1.5"
    makes: ClassVar[tuple[str, ...]] = ("T2V", "I2V")
    verified: ClassVar[str] = "ComfyUI; diffusers for its folders"
    full_precision: ClassVar[tuple[str, ...]] = (
        *(f"patch_embed.{name}.{leaf}" for name in ("proj", "text_proj") for leaf in ("weight", "bias")),
        _POSITIONS,
    )
    read_directly: ClassVar[tuple[str, ...]] = ("patch_embed",)
    not_quantised: ClassVar[tuple[str, ...]] = (
        "patch_embed", "time_embedding_linear_*", "ofs_embedding_linear_*", "norm1", "norm2", "norm_out", "proj_out",
    )  # fmt: skip

    # --- checkpoint ---------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        return all(marker in tensors for marker in _MARKERS)

    @classmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == "CogVideoXTransformer3DModel"

    def model_config(self, source: Source) -> dict[str, Any]:
        shapes = {name: info.shape for name, info in source.tensors.items()}
        rows = shapes[_POSITIONS][1] if _POSITIONS in shapes else 0
        if source.config is not None:
            two_stream.require(source, _FIXED)
            given = {key: value for key, value in source.config.items() if not key.startswith("_")}
            return _DEFAULTS | given | {"position_rows": rows, "single_file": False}
        try:
            hidden, embedder = shapes["blocks.0.norm1.linear.weight"][0] // 6, shapes["patch_embed.proj.weight"]
            patch_t = None if len(embedder) == 4 else 2
            patch = embedder[2] if patch_t is None else 2
            ofs = shapes.get("ofs_embedding_linear_1.weight")
            return _DEFAULTS | {
                "num_attention_heads": hidden // HEAD_DIM,
                "in_channels": embedder[1] if patch_t is None else embedder[1] // (patch_t * patch**2),
                "out_channels": shapes["proj_out.weight"][0] // ((patch_t or 1) * patch**2),
                "time_embed_dim": shapes["blocks.0.norm1.linear.weight"][1],
                "ofs_embed_dim": None if ofs is None else ofs[1],
                "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
                "num_layers": two_stream.count(shapes, "blocks"),
                "patch_size": patch,
                "patch_size_t": patch_t,
                "use_rotary_positional_embeddings": not rows,
                "position_rows": rows,
                "single_file": True,
            }
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"{source.path} looks like CogVideoX, but is incomplete: {error}") from error

    def model_class(self) -> Callable[..., nn.Module]:
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

        def model(*, position_rows: int, single_file: bool, **config: Any) -> nn.Module:
            """diffusers' model without its table of positions; learned ones are a parameter, as long as the file's."""
            built: Any = CogVideoXTransformer3DModel(**config | {"use_learned_positional_embeddings": False})
            built.patch_embed._buffers.pop("pos_embedding", None)
            if position_rows:
                width = config["num_attention_heads"] * HEAD_DIM
                built.patch_embed.pos_embedding = nn.Parameter(torch.empty(1, position_rows, width))
            built.single_file = single_file
            return built

        return model

    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        stem, _, leaf = name.rpartition(".")
        return [Piece(f"{rename(stem, _RENAMED)}.{leaf}")]

    def native_tensors(self, config: Mapping[str, Any]) -> Shapes:
        d, time = config["num_attention_heads"] * HEAD_DIM, config["time_embed_dim"]
        channels, ofs, patch = config["in_channels"], config["ofs_embed_dim"], _patch(config)
        linear: Shapes = {
            "patch_embed.proj": (d, channels * prod(patch)) if config["patch_size_t"] else (d, channels, *patch[1:]),
            "patch_embed.text_proj": (d, config["text_embed_dim"]),
            "time_embedding_linear_1": (time, d),
            "time_embedding_linear_2": (time, time),
            "norm_out.linear": (2 * d, time),
            "proj_out": (config["out_channels"] * prod(patch), d),
        }
        norms: Shapes = {"norm_final": (d,), "norm_out.norm": (d,)}
        if ofs is not None:
            linear |= {f"ofs_embedding_linear_{i}": (ofs, ofs) for i in (1, 2)}
        for i in range(config["num_layers"]):
            block = f"blocks.{i}"
            linear |= {f"{block}.{name}": (d, d) for name in ("q", "k", "v", "attn_out")}
            linear |= {f"{block}.ff_proj": (4 * d, d), f"{block}.ff_out": (d, 4 * d)}
            linear |= {f"{block}.norm{j}.linear": (6 * d, time) for j in (1, 2)}
            norms |= {f"{block}.norm{j}.norm": (d,) for j in (1, 2)}
            norms |= {f"{block}.norm_{name}": (HEAD_DIM,) for name in "qk"}
        learned: Shapes = {_POSITIONS: (1, config["position_rows"], d)} if config["position_rows"] else {}
        return two_stream.with_biases(linear | norms) | learned

    # --- inputs -------------------------------------------------------------------------------------------------

    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if unknown := sorted(set(shapes) - {"x", "timestep", "context", "ofs"}):
            raise UnsupportedError(f"CogVideoX (SP) cannot use the input {', '.join(unknown)} yet")
        if "context" not in shapes:
            raise UnsupportedError("CogVideoX needs a text encoder's conditioning; the conditioning has none")
        x, context = shapes["x"], shapes["context"]
        if len(x) != 5 or x[1] != config["in_channels"]:
            raise UnsupportedError(
                f"this CogVideoX checkpoint needs a latent of shape [batch, {config['in_channels']}, frames, height,"
                f" width], concatenated channels included; it is {list(x)}"
            )
        if len(context) != 3 or context[2] != config["text_embed_dim"]:
            raise UnsupportedError(
                f"the text conditioning has the shape {list(context)}; this checkpoint needs"
                f" [batch, tokens, {config['text_embed_dim']}]: is it from T5-XXL?"
            )
        for name in {"timestep", "ofs"} & set(shapes):
            if len(shapes[name]) != 1:
                raise UnsupportedError(f"CogVideoX needs one {name} per sample; got {list(shapes[name])}")
        grid = _grid(x, _patch(config))
        self._check_size(config, x, context, prod(grid))
        return prod(grid)

    @staticmethod
    def _check_size(config: Mapping[str, Any], x: tuple[int, ...], context: tuple[int, ...], tokens: int) -> None:
        if not config["position_rows"]:
            return
        longest, sample = config["max_text_seq_length"], (config["sample_height"], config["sample_width"])
        most = config["position_rows"] - longest
        if tokens > most:
            raise UnsupportedError(
                f"this CogVideoX has learned positions for {most} tokens of video; the latent {list(x)} has {tokens}"
            )
        if not config["single_file"] and (x[3:] != sample or context[1] > longest):
            raise UnsupportedError(
                f"this CogVideoX has learned positions for a latent of height and width {list(sample)} and for"
                f" {longest} tokens of text; the latent is {list(x)}, the text {list(context)}"
            )

    def prepare(self, conditioning: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return conditioning

    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        size = (3, 2 * (world_size + 1))
        if config["position_rows"] and not config["single_file"]:
            size = (config["sample_height"], config["sample_width"])
        inputs = {
            "x": random(1, config["in_channels"], 2, *size),
            "timestep": torch.tensor([500.0]),
            "context": random(1, 7, config["text_embed_dim"]),
        }
        return inputs if config["ofs_embed_dim"] is None else inputs | {"ofs": torch.tensor([2.0]).to(dtype)}

    # --- one step -----------------------------------------------------------------------------------------------

    def step(
        self, model: nn.Module, x: Tensor, timestep: Tensor, prepared: Any, out: Tensor, context: StepContext
    ) -> None:
        m: Any = model
        text, patch, embedder = prepared["context"], _patch(m.config), m.patch_embed
        # ComfyUI wraps incomplete patches around.
        missing = [-size % step for size, step in zip(x.shape[2:], patch, strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="circular")
        grid = _grid(x.shape, patch)
        plan = context.plan((prod(grid), text.shape[1]), m.config.num_attention_heads)
        (v0, v1), (t0, t1) = plan.stream_ranges(context.rank)

        times = m.time_embedding(m.time_proj(timestep).to(text.dtype))
        if m.ofs_embedding is not None and "ofs" in prepared:
            times = times + m.ofs_embedding(m.ofs_proj(prepared["ofs"]).to(text.dtype))
        exact = text.new_empty(0, dtype=torch.float32)  # as ComfyUI keeps and applies the embedders
        tokens = read_tokens(x, v0, v1, patch, exact)
        if embedder.proj.weight.ndim == 2:
            video = embedder.proj(tokens).type_as(text)
        else:
            video = F.linear(tokens, embedder.proj.weight.flatten(1), embedder.proj.bias).type_as(text)
        text = embedder.text_proj(text[:, t0:t1].to(exact)).type_as(text)
        video, text, table = _with_positions(m, video, text, plan.stream_ranges(context.rank), grid)

        def each_block(video: Tensor, text: Tensor) -> Blocks:
            attend, run = context.attention(plan), context.block(_block)
            for block in m.transformer_blocks:
                context.enter_block(plan)
                video, text = run(block, video, text, times, table, attend)
                yield video

        video = context.run_blocks(plan, video, each_block(video, text), lambda: times)
        video = m.proj_out(m.norm_out(m.norm_final(video), temb=times))
        write_tokens(video, out, v0, v1, patch)


def _patch(config: Mapping[str, Any]) -> Grid:
    return (config["patch_size_t"] or 1, config["patch_size"], config["patch_size"])


def _grid(shape: tuple[int, ...], patch: Grid) -> Grid:
    """Patches along time, height and width of a latent [B, C, T, H, W]; an incomplete one counts."""
    return tuple(-(-size // p) for size, p in zip(shape[2:], patch, strict=True))  # type: ignore[return-value]


def _with_positions(
    m: Any, video: Tensor, text: Tensor, ranges: tuple[Range, ...], grid: Grid
) -> tuple[Tensor, Tensor, Rope | None]:
    """This rank's ranges of both streams, with what is added for their positions, and what rotates their queries and
    keys (nothing, for the text)."""
    config, (_, height, width), ((v0, v1), (t0, t1)) = m.config, grid, ranges
    index = torch.arange(v0, v1, device=video.device)
    axes = (index // (height * width), index // width % height, index % width)
    learned = getattr(m.patch_embed, "pos_embedding", None)
    if learned is not None:
        longest = config.max_text_seq_length
        video = video + learned[:, longest + v0 : longest + v1].type_as(video)
        if not m.single_file:  # ComfyUI adds none to the text
            text = text + learned[:, t0:t1].type_as(text)
    if config.use_rotary_positional_embeddings:
        return video, text, two_stream.rope_with_text(rope(_coordinates(m, axes, grid), ROPE_AXES, THETA), t1 - t0)
    if learned is None:
        video = video + _sines(axes, config, video.shape[2]).type_as(video)
    return video, text, None


def _coordinates(m: Any, axes: tuple[Tensor, ...], grid: Grid) -> list[Tensor]:
    """Time, height and width of tokens, as the rotary embedding takes them."""
    config = m.config
    if config.patch_size_t is not None:
        return list(axes)
    if m.single_file:
        return [axes[0], *(axis * config.spatial_interpolation_scale for axis in axes[1:])]
    # diffusers fits the grid into that of the training size, and numbers it from there.
    base = [size // config.patch_size for size in (config.sample_height, config.sample_width)]
    scale = min(wanted / size for wanted, size in zip(base, grid[1:], strict=True))
    fitted = [axes[0].double()]
    for axis, wanted, size in zip(axes[1:], base, grid[1:], strict=True):
        length = round(scale * size)
        first = round((wanted - length) / 2)
        last = (first + length) * (size - 1) / size
        fitted.append(first + axis.double() * ((last - first) / max(size - 1, 1)))
    return fitted


def _sines(axes: tuple[Tensor, ...], config: Any, width: int) -> Tensor:
    """[S, width]: diffusers' position embedding: time, then width, then height, sines before cosines in each."""
    time, row, column = axes
    spatial, temporal = config.spatial_interpolation_scale, config.temporal_interpolation_scale
    parts = ((time / temporal, width // 4), (column / spatial, 3 * width // 8), (row / spatial, 3 * width // 8))
    tables = [rope((position,), (size,), THETA) for position, size in parts]
    return torch.cat([part for cos, sin in tables for part in (sin, cos)], dim=1)


def _modulated(norm: Any, video: Tensor, text: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Video rows, then text rows (possibly none), normalised and modulated, each stream by its part; and its gates."""
    shift, scale, gate, *of_text = norm.linear(F.silu(times))[:, None].chunk(6, dim=2)
    text_shift, text_scale, text_gate = of_text
    parts = norm.norm(video) * (1 + scale) + shift, norm.norm(text) * (1 + text_scale) + text_shift
    return torch.cat(parts, dim=1), gate, text_gate


def _block(
    block: Any, video: Tensor, text: Tensor, times: Tensor, table: Rope | None, attend: JointAttention
) -> tuple[Tensor, Tensor]:
    """video [B, n, hidden], text [B, m, hidden] → the same."""
    attn, n = block.attn1, video.shape[1]
    x, gate, text_gate = _modulated(block.norm1, video, text, times)
    q, k, v = (layer(x).unflatten(2, (-1, HEAD_DIM)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if table is not None:
        q, k = rotate(q, table), rotate(k, table)
    out = attn.to_out[0](attend(q, k, v).flatten(2))
    video, text = video + gate * out[:, :n], text + text_gate * out[:, n:]
    x, gate, text_gate = _modulated(block.norm2, video, text, times)
    out = block.ff(x)
    return video + gate * out[:, :n], text + text_gate * out[:, n:]
