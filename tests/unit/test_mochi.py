"""Mochi's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.adapters.base import pack_text
from parallel.adapters.mochi import MochiAdapter, _rope
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_mochi
from parallel.errors import CheckpointError, UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = MochiAdapter()
# Names and shapes of the released file, its sizes shrunk to 1 head of 96 and 2 layers, its texts to 96 and 64.
RELEASED: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.k_norm_x.weight": (96,), "blocks.0.attn.k_norm_y.weight": (96,),
    "blocks.0.attn.proj_x.bias": (96,), "blocks.0.attn.proj_x.weight": (96, 96),
    "blocks.0.attn.proj_y.bias": (96,), "blocks.0.attn.proj_y.weight": (96, 96),
    "blocks.0.attn.q_norm_x.weight": (96,), "blocks.0.attn.q_norm_y.weight": (96,),
    "blocks.0.attn.qkv_x.weight": (288, 96), "blocks.0.attn.qkv_y.weight": (288, 96),
    "blocks.0.mlp_x.w1.weight": (512, 96), "blocks.0.mlp_x.w2.weight": (96, 256),
    "blocks.0.mlp_y.w1.weight": (512, 96), "blocks.0.mlp_y.w2.weight": (96, 256),
    "blocks.0.mod_x.bias": (384,), "blocks.0.mod_x.weight": (384, 96),
    "blocks.0.mod_y.bias": (384,), "blocks.0.mod_y.weight": (384, 96),
    "blocks.1.attn.k_norm_x.weight": (96,), "blocks.1.attn.k_norm_y.weight": (96,),
    "blocks.1.attn.proj_x.bias": (96,), "blocks.1.attn.proj_x.weight": (96, 96),
    "blocks.1.attn.q_norm_x.weight": (96,), "blocks.1.attn.q_norm_y.weight": (96,),
    "blocks.1.attn.qkv_x.weight": (288, 96), "blocks.1.attn.qkv_y.weight": (288, 96),
    "blocks.1.mlp_x.w1.weight": (512, 96), "blocks.1.mlp_x.w2.weight": (96, 256),
    "blocks.1.mod_x.bias": (384,), "blocks.1.mod_x.weight": (384, 96),
    "blocks.1.mod_y.bias": (96,), "blocks.1.mod_y.weight": (96, 96),
    "final_layer.linear.bias": (48,), "final_layer.linear.weight": (48, 96),
    "final_layer.mod.bias": (192,), "final_layer.mod.weight": (192, 96),
    "pos_frequencies": (3, 1, 48),
    "t5_y_embedder.to_kv.bias": (128,), "t5_y_embedder.to_kv.weight": (128, 64),
    "t5_y_embedder.to_out.bias": (96,), "t5_y_embedder.to_out.weight": (96, 64),
    "t5_y_embedder.to_q.bias": (64,), "t5_y_embedder.to_q.weight": (64, 64),
    "t5_yproj.bias": (96,), "t5_yproj.weight": (96, 64),
    "t_embedder.mlp.0.bias": (96,), "t_embedder.mlp.0.weight": (96, 256),
    "t_embedder.mlp.2.bias": (96,), "t_embedder.mlp.2.weight": (96, 96),
    "x_embedder.proj.bias": (96,), "x_embedder.proj.weight": (96, 12, 2, 2),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {"x": (1, 12, 3, 10, 6), "timestep": (1,), "context": (1, 8, 64)}


def config_of(folder: Path) -> dict[str, Any]:
    write_tiny_mochi(folder / "model.safetensors", heads=1)
    return ADAPTER.model_config(open_source(str(folder / "model.safetensors")))


def inputs(changes: dict[str, tuple[int, ...]] | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
    shapes = of_shapes(SHAPES | (changes or {}))
    return shapes | {
        "attention_mask": torch.ones(1, 8, dtype=torch.long) if mask is None else mask,
        "num_tokens": pack_text("8"),
    }


def test_the_tiny_checkpoint_has_the_names_and_shapes_of_the_released_ones(tmp_path: Path):
    assert ADAPTER.native_tensors(config_of(tmp_path)) == RELEASED


def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path):
    written = write_tiny_mochi(tmp_path / "model.safetensors", heads=3, depth=4)
    assert ADAPTER.model_config(open_source(str(tmp_path / "model.safetensors"))) == written


def test_an_incomplete_file_is_named():
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in RELEASED.items() if name != "pos_frequencies"}
    with pytest.raises(CheckpointError, match=r"model.safetensors looks like Mochi, but is incomplete"):
        ADAPTER.model_config(Source("model.safetensors", infos, {}, None, {}))


def test_a_folder_of_another_activation_is_refused():
    with pytest.raises(UnsupportedError, match=r"activation_fn is gelu in config.json; only swiglu is supported"):
        ADAPTER.model_config(Source("folder", {}, {}, {"activation_fn": "gelu"}, {}))


def test_the_gate_of_the_mlp_comes_first_in_the_file(tmp_path: Path):
    """ComfyUI activates the first half of the rows, diffusers the second."""
    (piece,) = ADAPTER.pieces("blocks.0.mlp_x.w1.weight", (512, 96), config_of(tmp_path))
    assert piece.take(torch.arange(512)).tolist() == [*range(256, 512), *range(256)]


def test_good_inputs_give_the_number_of_tokens(tmp_path: Path):
    assert ADAPTER.check_inputs(config_of(tmp_path), inputs()) == 3 * 5 * 3


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (inputs({"guidance": (1,)}), "cannot use the input guidance yet"),
        (inputs({"x": (1, 12, 3, 9, 6)}), "latent height is 9; Mochi needs a multiple of 2"),
        (inputs({"x": (1, 12, 10, 6)}), r"\[batch, 12, frames, height, width\]; it is \[1, 12, 10, 6\]"),
        (inputs({"timestep": (1, 3)}), r"one timestep per sample; got \[1, 3\]"),
        (inputs(mask=torch.ones(1, 8)), "attention_mask is torch.float32"),
        (inputs(mask=torch.ones(1, 7, dtype=torch.long)), r"of shape \[1, 7\].* each of the 8 text tokens"),
        (inputs(mask=torch.zeros(1, 8, dtype=torch.long)), "leaves none of a sample's text tokens"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(tmp_path: Path, given: dict[str, Tensor], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(config_of(tmp_path), given)


@pytest.mark.parametrize("missing", ["attention_mask", "num_tokens"])
def test_a_text_without_its_mask_is_refused(tmp_path: Path, missing: str):
    given = {name: tensor for name, tensor in inputs().items() if name != missing}
    with pytest.raises(
        UnsupportedError, match=f"Mochi needs its text encoder's conditioning; this one has no {missing}"
    ):
        ADAPTER.check_inputs(config_of(tmp_path), given)


def test_positions_do_not_depend_on_the_split():
    """Each range has the rows that it has of the whole, and text is not rotated."""
    frequencies = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    whole = _rope(frequencies, 0, 30, (2, 3, 5), 4)
    for table, neutral in zip(whole, (1.0, 0.0), strict=True):
        assert (table[30:] == neutral).all()
    for part, all_rows in zip(_rope(frequencies, 7, 19, (2, 3, 5), 0), whole, strict=True):
        assert torch.equal(part, all_rows[7:19])
