"""Qwen-Image's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.adapters.base import pack_text
from parallel.adapters.qwen_image import QwenImageAdapter, _offsets, _positions
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_qwen_image
from parallel.errors import UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = QwenImageAdapter()
VARIANTS: dict[str, dict[str, Any]] = {
    "text_to_picture": {},
    "edit_2511": {"clean_references": True},
    "layered": {"layered": True},
}
_LAYERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
_WEIGHTS: dict[str, tuple[int, ...]] = {
    "img_in": (128, 64),
    "txt_in": (128, 32),
    "norm_out.linear": (256, 128),
    "proj_out": (64, 128),
    "time_text_embed.timestep_embedder.linear_1": (128, 256),
    "time_text_embed.timestep_embedder.linear_2": (128, 128),
    **{f"transformer_blocks.0.attn.{layer}": (128, 128) for layer in _LAYERS},
    **{f"transformer_blocks.0.{stream}_mod.1": (768, 128) for stream in ("img", "txt")},
    **{f"transformer_blocks.0.{stream}_mlp.net.0.proj": (512, 128) for stream in ("img", "txt")},
    **{f"transformer_blocks.0.{stream}_mlp.net.2": (128, 512) for stream in ("img", "txt")},
}
# Names and shapes of the released file, its sizes shrunk to 1 head and 1 layer, its text to 32.
RELEASED: dict[str, tuple[int, ...]] = {
    **{f"{name}.{leaf}": s for name, w in _WEIGHTS.items() for leaf, s in (("weight", w), ("bias", w[:1]))},
    **{f"transformer_blocks.0.attn.norm_{n}.weight": (128,) for n in ("q", "k", "added_q", "added_k")},
    "txt_norm.weight": (32,),
}
CONFIG = {"in_channels": 64, "joint_attention_dim": 32}
INPUTS: dict[str, tuple[int, ...]] = {"x": (1, 16, 1, 9, 6), "timestep": (1,), "context": (1, 8, 32)}


def test_the_tiny_checkpoint_has_the_names_and_shapes_of_the_released_ones(tmp_path: Path):
    config = write_tiny_qwen_image(tmp_path / "model.safetensors", heads=1, depth=1, context_dim=32)
    assert ADAPTER.native_tensors(config) == RELEASED


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path, variant: str):
    written = write_tiny_qwen_image(tmp_path / "model.safetensors", heads=2, depth=3, **VARIANTS[variant])
    source = open_source(str(tmp_path / "model.safetensors"))
    assert ADAPTER.model_config(source) == written
    assert ADAPTER.native_tensors(written) == {name: info.shape for name, info in source.tensors.items()}


def test_relatives_are_refused_by_name():
    shapes = RELEASED | {"txt_norm.weight": (2560,), "proj_out.weight": (128, 128)}
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    source = Source("model.safetensors", infos, {}, None, {})
    with pytest.raises(UnsupportedError, match="Mage-Flow is not supported yet"):
        adapter_for(source).model_config(source)


def test_a_folder_with_guidance_is_refused():
    with pytest.raises(UnsupportedError, match=r"guidance_embeds is True in config.json; only False"):
        ADAPTER.model_config(Source("folder", {}, {}, {"guidance_embeds": True}, {}))


def test_references_do_not_count_as_tokens_of_the_latent():
    for method in (None, "index", "index_timestep_zero", "negative_index", "offset"):
        given = of_shapes(INPUTS | {"ref_latents.0": (1, 16, 1, 3, 4), "ref_latents.1": (1, 16, 1, 8, 8)})
        given |= {} if method is None else {"ref_latents_method": pack_text(method)}
        assert ADAPTER.check_inputs(CONFIG, given) == 5 * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"guidance": (1,)}, "cannot use the input guidance yet"),
        ({"ref_latents.0": (1, 4, 1, 8, 8)}, r"\(ref_latents.0\) needs .*\[batch, 16, .* it is \[1, 4, 1, 8, 8\]"),
        ({"ref_latents.0": (2, 16, 1, 8, 8)}, "ref_latents.0 has 2 pictures; needed is one for each of 1"),
        ({"x": (1, 16, 9, 6)}, r"\[batch, 16, frames, height, width\]; it is \[1, 16, 9, 6\]"),
        ({"timestep": (1, 2)}, r"one timestep per sample; got \[1, 2\]"),
        ({"context": (1, 8, 64)}, r"\[1, 8, 64\].*Qwen2.5-VL"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | changes))


def test_a_method_that_cannot_be_honoured_is_named():
    given = of_shapes(INPUTS) | {"ref_latents_method": pack_text("uxo")}
    with pytest.raises(UnsupportedError, match="reference method uxo; choose index, index_timestep_zero, negative"):
        ADAPTER.check_inputs(CONFIG, given)


def test_kept_text_keeps_its_place():
    """Padding before the text leaves a gap between the picture's positions and the text's."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    (prompts,) = ADAPTER.prepare({"context": torch.zeros(1, 8, 32), "attention_mask": mask})
    assert prompts.text.shape == (1, 5, 32)
    assert prompts.places.tolist() == [3, 4, 5, 6, 7]


def test_pictures_are_centred():
    """Of an odd number of tokens the middle one is at 0, of an even one the first of the second half."""
    plane, row, column = _positions(0, 12, (1, 3, 4), (2, 0, 0), torch.device("cpu"))
    assert plane.tolist() == [2] * 12
    assert row.tolist() == [-1] * 4 + [0] * 4 + [1] * 4
    assert column.tolist() == [-2, -1, 0, 1] * 3
    frames, *_ = _positions(3, 10, (2, 2, 3), (0, 0, 0), torch.device("cpu"))
    assert frames.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_places_of_references():
    references = [torch.zeros(1, 16, 1, *size) for size in [(4, 8), (6, 4), (2, 3)]]
    assert (
        _offsets(references, "index")
        == _offsets(references, "index_timestep_zero")
        == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    )
    assert _offsets(references, "negative_index") == [(-1, 0, 0), (-2, 0, 0), (-3, 0, 0)]
    assert _offsets(references, "offset") == [(1, 0, 0), (1, 2, 0), (1, 0, 4)]
