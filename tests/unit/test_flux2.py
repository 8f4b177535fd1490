"""FLUX.2's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.adapters.base import pack_text
from parallel.adapters.flux2 import Flux2Adapter, _offsets, _positions
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_flux2
from parallel.errors import CheckpointError, UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = Flux2Adapter()
_WEIGHTS: dict[str, tuple[int, ...]] = {
    "img_in": (128, 128),
    "txt_in": (128, 32),
    "time_in.in_layer": (128, 256),
    "time_in.out_layer": (128, 128),
    "guidance_in.in_layer": (128, 256),
    "guidance_in.out_layer": (128, 128),
    "double_stream_modulation_img.lin": (768, 128),
    "double_stream_modulation_txt.lin": (768, 128),
    "single_stream_modulation.lin": (384, 128),
    **{f"double_blocks.0.{stream}_attn.qkv": (384, 128) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_attn.proj": (128, 128) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.0": (768, 128) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.2": (128, 384) for stream in ("img", "txt")},
    "single_blocks.0.linear1": (384 + 768, 128),
    "single_blocks.0.linear2": (128, 128 + 384),
    "final_layer.adaLN_modulation.1": (256, 128),
    "final_layer.linear": (128, 128),
}
_NORMS = [
    f"{block}.norm.{part}_norm"
    for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0")
    for part in ("query", "key")
]
# Names and shapes of the released file, its sizes shrunk to 1 head and 1 + 1 blocks, its text to 32.
RELEASED: dict[str, tuple[int, ...]] = {
    **{f"{name}.weight": shape for name, shape in _WEIGHTS.items()},
    **{f"{name}.scale": (128,) for name in _NORMS},
}
CONFIG = {"in_channels": 128, "joint_attention_dim": 32}
INPUTS: dict[str, tuple[int, ...]] = {"x": (1, 128, 9, 6), "timestep": (1,), "context": (1, 8, 32), "guidance": (1,)}
REFERENCES = {"ref_latents.0": (1, 128, 3, 4), "ref_latents.1": (1, 128, 8, 8)}


def source_of(shapes: dict[str, tuple[int, ...]]) -> Source:
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    return Source("model.safetensors", infos, {}, None, {})


def test_the_tiny_checkpoint_has_the_names_and_shapes_of_the_released_ones(tmp_path: Path):
    """But for the norms: ComfyUI's name for their `scale` is `weight`, and it saves files with that."""
    config = write_tiny_flux2(tmp_path / "model.safetensors", heads=1, context_dim=32)
    released = {name.replace("_norm.scale", "_norm.weight"): shape for name, shape in RELEASED.items()}
    assert ADAPTER.native_tensors(config) == released


def test_released_files_fill_the_same_parameters_as_comfyuis(tmp_path: Path):
    config = ADAPTER.model_config(source_of(RELEASED))
    for name, shape in RELEASED.items():
        own = name.replace("_norm.scale", "_norm.weight")
        assert [p.name for p in ADAPTER.pieces(name, shape, config)] == [
            p.name for p in ADAPTER.pieces(own, shape, config)
        ]


@pytest.mark.parametrize("variant", [{}, {"guidance": False, "depth_single": 4}], ids=["dev", "klein"])
def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path, variant: dict[str, Any]):
    written = write_tiny_flux2(tmp_path / "model.safetensors", heads=2, depth=3, **variant)
    source = open_source(str(tmp_path / "model.safetensors"))
    assert adapter_for(source).family == "flux2"
    assert ADAPTER.model_config(source) == written


def test_a_file_that_lacks_a_tensor_is_refused():
    with pytest.raises(CheckpointError, match=r"looks like FLUX.2, but is incomplete: 'txt_in.weight'"):
        ADAPTER.model_config(source_of({name: s for name, s in RELEASED.items() if name != "txt_in.weight"}))


def test_a_folder_with_other_mathematics_is_refused():
    with pytest.raises(UnsupportedError, match=r"mlp_ratio is 4.0 in config.json; only 3.0 is supported"):
        ADAPTER.model_config(Source("folder", {}, {}, {"mlp_ratio": 4.0}, {}))


def test_references_do_not_count_as_tokens_of_the_latent():
    for method in (None, "index", "index_timestep_zero", "offset", "uxo"):
        placed = {} if method is None else {"ref_latents_method": pack_text(method)}
        assert ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | REFERENCES) | placed) == 9 * 6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_mask": (1, 8), "refs.0": (1, 16, 3, 4)}, "cannot use the input attention_mask, refs.0 yet"),
        ({"ref_latents.1": (1, 4, 8, 8)}, r"\[1, 128, height, width\] for this latent; ref_latents.1 is \[1, 4, 8, 8"),
        ({"ref_latents.0": (2, 128, 8, 8)}, r"ref_latents.0 is \[2, 128, 8, 8\]"),
        ({"x": (1, 16, 9, 6)}, r"\[batch, 128, height, width\]; it is \[1, 16, 9, 6\]"),
        ({"x": (1, 128, 1, 9, 6)}, r"\[batch, 128, height, width\]; it is \[1, 128, 1, 9, 6\]"),
        ({"timestep": (1, 2)}, r"one timestep per sample; got \[1, 2\]"),
        ({"context": (1, 8, 64)}, r"\[1, 8, 64\]; this checkpoint needs \[batch, tokens, 32\]"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | changes))


def test_a_method_that_cannot_be_honoured_is_named():
    given = of_shapes(INPUTS | REFERENCES) | {"ref_latents_method": pack_text("negative_index")}
    with pytest.raises(UnsupportedError, match="method negative_index; choose index, index_timestep_zero, offset, uxo"):
        ADAPTER.check_inputs(CONFIG, given)


def test_padding_is_attended_to():
    """ComfyUI pads the text to 512 tokens before it, and sends no mask."""
    text = torch.cat([torch.zeros(1, 5, 32), torch.ones(1, 3, 32)], dim=1)
    assert torch.equal(ADAPTER.prepare({"context": text}).text, text)


def test_places_of_references():
    """In elements of the latent, each of which is a token; planes are ten apart."""
    references = [torch.zeros(1, 128, *size) for size in [(4, 8), (6, 4), (2, 3)]]
    x = torch.zeros(1, 128, 9, 6)
    assert _offsets(references, "index", x) == [(10, 0, 0), (20, 0, 0), (30, 0, 0)]
    assert _offsets(references, "index_timestep_zero", x) == _offsets(references, "index", x)
    assert _offsets(references, "uxo", x) == [(0, 9, 6), (0, 13, 14), (0, 19, 18)]
    assert _offsets(references, "offset", x) == [(1, 0, 0), (1, 4, 0), (1, 0, 8)]


def test_positions_of_a_part_of_a_picture():
    plane, row, column, place = _positions(2, 5, (1, 3, 3), (10, 4, 0), torch.device("cpu")).tolist()
    assert (plane, row, column, place) == ([10] * 3, [4, 5, 5], [2, 0, 1], [0] * 3)
