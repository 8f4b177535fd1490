"""LTXV's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.adapters.base import pack_text
from parallel.adapters.ltxv import CAUSAL, LTXVAdapter, _Prompts, _rope
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_ltxv
from parallel.errors import CheckpointError, UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = LTXVAdapter()
# Names and shapes of the released file, its sizes shrunk to 1 head of 64 and 1 layer, its text to 32.
RELEASED: dict[str, tuple[int, ...]] = {
    "adaln_single.emb.timestep_embedder.linear_1.bias": (64,),
    "adaln_single.emb.timestep_embedder.linear_1.weight": (64, 256),
    "adaln_single.emb.timestep_embedder.linear_2.bias": (64,),
    "adaln_single.emb.timestep_embedder.linear_2.weight": (64, 64),
    "adaln_single.linear.bias": (384,),
    "adaln_single.linear.weight": (384, 64),
    "caption_projection.linear_1.bias": (64,),
    "caption_projection.linear_1.weight": (64, 32),
    "caption_projection.linear_2.bias": (64,),
    "caption_projection.linear_2.weight": (64, 64),
    "patchify_proj.bias": (64,),
    "patchify_proj.weight": (64, 128),
    "proj_out.bias": (128,),
    "proj_out.weight": (128, 64),
    "scale_shift_table": (2, 64),
    "transformer_blocks.0.scale_shift_table": (6, 64),
    "transformer_blocks.0.ff.net.0.proj.bias": (256,),
    "transformer_blocks.0.ff.net.0.proj.weight": (256, 64),
    "transformer_blocks.0.ff.net.2.bias": (64,),
    "transformer_blocks.0.ff.net.2.weight": (64, 256),
    **{
        f"transformer_blocks.0.{attention}.{layer}.{leaf}": (64, 64) if leaf == "weight" else (64,)
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for leaf in ("weight", "bias")
    },
    **{f"transformer_blocks.0.{a}.{n}_norm.weight": (64,) for a in ("attn1", "attn2") for n in ("q", "k")},
}
SHAPES: dict[str, tuple[int, ...]] = {"x": (1, 128, 3, 5, 4), "timestep": (1,), "context": (1, 8, 32)}
RELEASED_METADATA = {
    "num_attention_heads": 1, "attention_head_dim": 64, "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048], "timestep_scale_multiplier": 1000, "qk_norm": "rms_norm",
}  # fmt: skip


def released(more: dict[str, tuple[int, ...]] | None = None, **metadata: Any) -> Source:
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in (RELEASED | (more or {})).items()}
    told = {"config": json.dumps({"transformer": RELEASED_METADATA | metadata})}
    return Source("model.safetensors", infos, told, None, {})


def test_the_tiny_checkpoint_has_the_names_and_shapes_of_the_released_ones(tmp_path: Path):
    config = write_tiny_ltxv(tmp_path / "model.safetensors", heads=1, depth=1, context_dim=32)
    assert ADAPTER.native_tensors(config) == RELEASED


@pytest.mark.parametrize("causal", [False, True])
def test_the_configuration_is_read_back_from_shapes_and_metadata(tmp_path: Path, causal: bool):
    written = write_tiny_ltxv(tmp_path / "model.safetensors", heads=3, depth=2, causal=causal)
    assert ADAPTER.model_config(open_source(str(tmp_path / "model.safetensors"))) == written


def test_a_file_without_metadata_is_read_as_comfyui_reads_it():
    """32 heads, and positions of version 0.9.0."""
    source = released()
    wide = {
        name: TensorInfo(tuple(32 * n if n == 64 else n for n in i.shape), i.dtype)
        for name, i in source.tensors.items()
    }
    config = ADAPTER.model_config(Source("model.safetensors", wide, {}, None, {}))
    assert (config["num_attention_heads"], config["attention_head_dim"], config[CAUSAL]) == (32, 64, False)


@pytest.mark.parametrize(
    ("marker", "relative"),
    [
        ("audio_adaln_single.linear.weight", "LTX-2"),
        ("keyframes_abs_pos_embedding", "keyframe embedding"),
        ("prompt_adaln_single.linear.weight", "modulated text"),
    ],
)
def test_relatives_are_refused_by_name(marker: str, relative: str):
    source = released({marker: (1,)})
    with pytest.raises(UnsupportedError, match=f"{relative}.*not supported yet"):
        adapter_for(source).model_config(source)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_type", "split"), ("positional_embedding_max_pos", [20, 1024, 1024]), ("cross_attention_adaln", True)],
)
def test_other_mathematics_in_the_metadata_is_refused_by_name(key: str, value: Any):
    with pytest.raises(UnsupportedError, match=rf"{key} is .* in the file's metadata; only"):
        ADAPTER.model_config(released(**{key: value}))


def test_damaged_metadata_is_named():
    source = released()
    with pytest.raises(CheckpointError, match="metadata entry 'config' cannot be read"):
        ADAPTER.model_config(Source(source.path, source.tensors, {"config": "{"}, None, {}))


def test_a_folder_that_does_not_tell_its_positions_is_refused():
    """Nothing but the version tells them, and the results would look almost right."""
    with pytest.raises(UnsupportedError, match=f"{CAUSAL} is not in config.json.* true for LTX-Video 0.9.5 and newer"):
        ADAPTER.model_config(Source("folder", {}, {}, {"num_layers": 28}, {}))
    assert ADAPTER.model_config(Source("folder", {}, {}, {CAUSAL: True}, {}))[CAUSAL]


def inputs(changes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    return of_shapes(SHAPES | (changes or {})) | {"frame_rate": pack_text("25")}


@pytest.mark.parametrize("timestep", [(1,), (1, 60, 1), (1, 1, 1)])
def test_good_inputs_give_the_number_of_tokens(timestep: tuple[int, ...]):
    given = inputs({"timestep": timestep, "denoise_mask": (1, 1, 3, 5, 4), "keyframe_idxs": (1, 3, 0, 2)})
    assert ADAPTER.check_inputs({"in_channels": 128, "caption_channels": 32}, given) == 60


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"keyframe_idxs": (1, 3, 20, 2)}, r"keyframes \(LTXVAddGuide\)"),
        ({"guide_attention_entries": (1,)}, "cannot use the input guide_attention_entries yet"),
        ({"timestep": (1, 59, 1)}, r"one per token \(60\); got \[1, 59, 1\]"),
        ({"x": (1, 64, 3, 5, 4)}, r"\[batch, 128, frames, height, width\]; it is \[1, 64, 3, 5, 4\]"),
        ({"context": (1, 8, 48)}, r"\[1, 8, 48\].*T5-XXL"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs({"in_channels": 128, "caption_channels": 32}, inputs(changes))


def test_a_broken_frame_rate_reaches_the_positions_exactly():
    """In bf16, the dtype of the conditioning, it would be 24."""
    text = torch.zeros(1, 8, 32, dtype=torch.bfloat16)
    (prompts,) = ADAPTER.prepare({"context": text, "frame_rate": pack_text("23.976")})
    assert prompts.frame_rate == 23.976


def test_only_valid_text_is_attended_to():
    text = torch.arange(16.0).reshape(2, 8, 1)
    mask = (torch.arange(8) < torch.tensor([[5], [3]])).long()
    prompts = ADAPTER.prepare({"context": text, "attention_mask": mask})
    assert [p.text.flatten().tolist() for p in prompts] == [[0, 1, 2, 3, 4], [8, 9, 10]]
    (together,) = ADAPTER.prepare({"context": text, "attention_mask": mask[:1].repeat(2, 1)})
    assert together.text.shape == (2, 5, 1)


@pytest.mark.parametrize("causal", [False, True])
def test_positions_do_not_depend_on_the_split(causal: bool):
    from diffusers.configuration_utils import FrozenDict

    config = FrozenDict({CAUSAL: causal, "num_attention_heads": 2, "attention_head_dim": 16})
    prompts = _Prompts(slice(None), torch.zeros(1, 1, 1), 25.0)
    whole = _rope(config, 0, 30, (2, 3, 5), prompts)
    assert whole[0].shape == (30, 2, 8)
    for part, every in zip(_rope(config, 7, 19, (2, 3, 5), prompts), whole, strict=True):
        assert torch.equal(part, every[7:19])
