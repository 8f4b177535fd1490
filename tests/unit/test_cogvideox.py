"""CogVideoX's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.adapters.cogvideox import CogVideoXAdapter
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_cogvideox
from parallel.errors import CheckpointError, UnsupportedError
from parallel.worker.resident import ResidentModel
from tests.unit.inputs import of_shapes

ADAPTER = CogVideoXAdapter()
VARIANTS: dict[str, dict[str, Any]] = {
    "2b_or_5b": {"heads": 1, "depth": 1, "context_dim": 32},
    "i2v": {"heads": 2, "depth": 3, "in_channels": 32},
    "learned_positions": {"heads": 1, "depth": 1, "learned_positions": 12},
    "1.5": {"heads": 1, "depth": 1, "frames_per_patch": 2},
    "1.5_i2v": {"heads": 1, "depth": 1, "frames_per_patch": 2, "in_channels": 32, "ofs": True},
}

# ComfyUI's own names and shapes of one block and of everything around it, hidden size 64, width of the times 96.
D, TEXT, TIME = 64, 32, 96
LINEAR = {
    "patch_embed.proj": (D, 16, 2, 2), "patch_embed.text_proj": (D, TEXT), "time_embedding_linear_1": (TIME, D),
    "time_embedding_linear_2": (TIME, TIME), "norm_final": (D,), "norm_out.linear": (2 * D, TIME),
    "norm_out.norm": (D,), "proj_out": (64, D), **{f"blocks.0.{name}": (D, D) for name in ("q", "k", "v", "attn_out")},
    **{f"blocks.0.norm_{name}": (64,) for name in "qk"}, **{f"blocks.0.norm{i}.linear": (6 * D, TIME) for i in (1, 2)},
    **{f"blocks.0.norm{i}.norm": (D,) for i in (1, 2)}, "blocks.0.ff_proj": (4 * D, D), "blocks.0.ff_out": (D, 4 * D),
}  # fmt: skip
RELEASED = {
    **{f"{name}.weight": shape for name, shape in LINEAR.items()},
    **{f"{name}.bias": shape[:1] for name, shape in LINEAR.items()},
}
OF_15 = {  # what CogVideoX 1.5 image-to-video has in other shapes, and more
    "patch_embed.proj.weight": (D, 256), "proj_out.weight": (128, D), "proj_out.bias": (128,),
    **{f"ofs_embedding_linear_{i}.weight": (TIME, TIME) for i in (1, 2)},
    **{f"ofs_embedding_linear_{i}.bias": (TIME,) for i in (1, 2)},
}  # fmt: skip
INPUTS: dict[str, tuple[int, ...]] = {"x": (1, 16, 3, 9, 6), "timestep": (1,), "context": (1, 226, TEXT)}


def source_of(shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> Source:
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    return Source("model.safetensors", infos, {}, config, {})


def config_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return ADAPTER.model_config(source_of(shapes))


@pytest.mark.parametrize("shapes", [RELEASED, RELEASED | OF_15], ids=["1.0", "1.5_i2v"])
def test_the_tensors_have_the_names_and_shapes_of_the_released_ones(shapes: dict[str, tuple[int, ...]]):
    assert isinstance(adapter_for(source_of(shapes)), CogVideoXAdapter)
    assert ADAPTER.native_tensors(config_of(shapes)) == shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_is_read_back_and_every_parameter_is_filled(tmp_path: Path, variant: str):
    written = write_tiny_cogvideox(tmp_path / "model.safetensors", **VARIANTS[variant])
    source = open_source(str(tmp_path / "model.safetensors"))
    config = ADAPTER.model_config(source)
    assert config.items() >= written.items()
    with torch.device("meta"):
        expected = {name: p.shape for name, p in ADAPTER.model_class()(**config).named_parameters()}
    filled = {ADAPTER.pieces(name, info.shape, config)[0].name: info.shape for name, info in source.tensors.items()}
    assert len(filled) == len(source.tensors) and filled == expected


def test_a_folder_has_the_single_files_learned_positions(tmp_path: Path):
    write_tiny_cogvideox(tmp_path / "model.safetensors", **VARIANTS["learned_positions"])
    recipe = {"path": str(tmp_path / "model.safetensors"), "weight_dtype": "float32", "compute_dtype": "float32"}
    native: Any = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model
    native.save_pretrained(tmp_path / "folder")
    folder = ResidentModel(recipe | {"path": str(tmp_path / "folder")}, torch.device("cpu"), lambda *_: None)
    assert folder.config["position_rows"] == 226 + 12
    assert torch.equal(folder.model.get_parameter("patch_embed.pos_embedding"), native.patch_embed.pos_embedding)


def test_the_embedders_stay_exact_as_in_comfyui(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    write_tiny_cogvideox(path, **VARIANTS["1.5"])
    kept = {
        storage: ResidentModel(
            {"path": str(path), "weight_dtype": storage, "compute_dtype": "bfloat16"},
            torch.device("cpu"),
            lambda *_: None,
        ).model
        for storage in ("float32", "float8_e4m3fn")
    }
    for name in ("proj.weight", "text_proj.bias"):
        exact, fp8 = (model.get_parameter(f"patch_embed.{name}") for model in kept.values())
        assert exact.dtype == torch.float32 and torch.equal(exact, fp8)
    assert kept["float8_e4m3fn"].get_parameter("transformer_blocks.0.attn1.to_q.weight").dtype == torch.float8_e4m3fn


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("attention_head_dim", 32), ("attention_bias", False), ("timestep_activation_fn", "gelu")]
)
def test_a_folder_of_another_kind_is_refused_by_name(key: str, value: Any):
    config = {"_class_name": "CogVideoXTransformer3DModel", key: value}
    with pytest.raises(UnsupportedError, match=f"{key} is {value} in config.json"):
        ADAPTER.model_config(source_of({}, config))


@pytest.mark.parametrize("lost", ["proj_out.weight", "patch_embed.proj.weight"])
def test_an_incomplete_file_is_named(lost: str):
    with pytest.raises(CheckpointError, match=f"looks like CogVideoX, but is incomplete.*{lost}"):
        config_of({name: shape for name, shape in RELEASED.items() if name != lost})


def test_good_inputs_give_the_number_of_tokens():
    assert ADAPTER.check_inputs(config_of(RELEASED), of_shapes(INPUTS)) == 3 * 5 * 3
    of_15 = {"x": (2, 32, 3, 9, 6), "timestep": (2,), "context": (2, 226, TEXT), "ofs": (2,)}
    assert ADAPTER.check_inputs(config_of(RELEASED | OF_15), of_shapes(of_15)) == 2 * 5 * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"guidance": (1,)}, "CogVideoX .SP. cannot use the input guidance yet"),
        ({"x": (1, 32, 3, 9, 6)}, r"needs a latent of shape \[batch, 16, .*; it is \[1, 32, 3, 9, 6\]"),
        ({"context": (1, 226, 64)}, r"needs \[batch, tokens, 32\]: is it from T5-XXL"),
        ({"timestep": (1, 3)}, r"one timestep per sample; got \[1, 3\]"),
        ({"ofs": (1, 1)}, r"one ofs per sample; got \[1, 1\]"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(config_of(RELEASED), of_shapes(INPUTS | changes))


LEARNED = RELEASED | {"patch_embed.pos_embedding": (1, 226 + 45, D)}


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (None, {"x": (1, 16, 4, 9, 6)}, r"learned positions for 45 tokens of video; the latent .* has 60"),
        ((9, 7), {}, r"for a latent of height and width \[9, 7\] and for 226 tokens of text; the latent is \[1, 16, 3"),
        ((9, 6), {"context": (1, 227, TEXT)}, r"for 226 tokens of text; .* the text \[1, 227, 32\]"),
    ],
)
def test_positions_that_were_not_learned_are_refused(
    config: tuple[int, int] | None, changes: dict[str, tuple[int, ...]], complaint: str
):
    """A single file's table tells only how many there are; ComfyUI takes the first of them for any size."""
    folder = {"text_embed_dim": TEXT, "num_attention_heads": 1}
    size = {"sample_height": config[0], "sample_width": config[1]} if config else {}
    of = ADAPTER.model_config(source_of(LEARNED, folder | size if config else None))
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(of, of_shapes(INPUTS | changes))
