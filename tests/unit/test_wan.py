"""Wan's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.adapters.registry import adapter_for
from parallel.adapters.wan import WanAdapter
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_wan
from parallel.errors import CheckpointError, UnsupportedError
from parallel.worker.resident import ResidentModel
from tests.unit.inputs import of_shapes

ADAPTER = WanAdapter()
TINY: dict[str, Any] = {"heads": 1, "depth": 1, "context_dim": 32}
VARIANTS = {
    "t2v": TINY,
    "deeper": TINY | {"heads": 2, "depth": 3},
    "i2v": TINY | {"in_channels": 36, "clip": True},
    "first_and_last_frame": TINY | {"in_channels": 36, "clip": True, "clip_positions": 514},
    "i2v_2.2": TINY | {"in_channels": 36},
    "ti2v_5b": TINY | {"in_channels": 48, "out_channels": 48},
}

# Wan's own names and shapes of one block with image attention and of everything around it, hidden size 128.
D, TEXT, IMAGE, FFN = 128, 32, 1280, 384
LINEAR = {
    "text_embedding.0": (D, TEXT), "text_embedding.2": (D, D), "time_embedding.0": (D, 256),
    "time_embedding.2": (D, D), "time_projection.1": (6 * D, D), "head.head": (64, D),
    "img_emb.proj.0": (IMAGE,), "img_emb.proj.1": (IMAGE, IMAGE), "img_emb.proj.3": (D, IMAGE), "img_emb.proj.4": (D,),
    **{f"blocks.0.self_attn.{name}": (D, D) for name in "qkvo"},
    **{f"blocks.0.cross_attn.{name}": (D, D) for name in ("q", "k", "v", "o", "k_img", "v_img")},
    "blocks.0.norm3": (D,), "blocks.0.ffn.0": (FFN, D), "blocks.0.ffn.2": (D, FFN), "patch_embedding": (D, 36, 1, 2, 2),
}  # fmt: skip
RELEASED = {
    **{f"{name}.weight": shape for name, shape in LINEAR.items()},
    **{f"{name}.bias": shape[:1] for name, shape in LINEAR.items()},
    **{f"blocks.0.self_attn.norm_{name}.weight": (D,) for name in "qk"},
    **{f"blocks.0.cross_attn.norm_{name}.weight": (D,) for name in ("q", "k", "k_img")},
    "blocks.0.modulation": (1, 6, D),
    "head.modulation": (1, 2, D),
}


def build(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name → shape of every parameter of diffusers' own model."""
    model_class = ADAPTER.model_class()
    with torch.device("meta"):
        return {name: p.shape for name, p in model_class(**config).named_parameters()}


def resident(path: Path, storage: str = "float32", compute: str = "float32") -> ResidentModel:
    recipe = {"path": str(path), "weight_dtype": storage, "compute_dtype": compute}
    return ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)


def written(path: Path, **options: Any) -> Source:
    write_tiny_wan(path, **options)
    return open_source(str(path))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "i2v.safetensors"
    write_tiny_wan(path, **VARIANTS["i2v"])
    return path


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_the_tiny_checkpoint_has_the_names_and_shapes_of_the_released_ones(i2v: Path):
    assert {name: tuple(tensor.shape) for name, tensor in load_file(i2v).items()} == RELEASED


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_filled_exactly_once(tmp_path: Path, variant: str, prefix: str):
    source = written(tmp_path / "model.safetensors", prefix=prefix, **VARIANTS[variant])
    assert isinstance(adapter_for(source), WanAdapter)
    config = ADAPTER.model_config(source)
    filled: dict[str, torch.Size] = {}
    for name, info in source.tensors.items():
        (piece,) = ADAPTER.pieces(name, info.shape, config)
        assert piece.name not in filled, f"{piece.name} is filled twice"
        filled[piece.name] = torch.Size(info.shape)
    assert filled == build(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path, variant: str):
    path = tmp_path / "model.safetensors"
    written_config = write_tiny_wan(path, **VARIANTS[variant])
    assert ADAPTER.model_config(open_source(str(path))).items() >= written_config.items()


def test_a_diffusers_folder_gives_the_same_parameters(i2v: Path, tmp_path: Path):
    native = resident(i2v)
    native.model.save_pretrained(tmp_path)  # type: ignore[operator]
    source = open_source(str(tmp_path))
    assert isinstance(adapter_for(source), WanAdapter)
    assert ADAPTER.native_tensors(ADAPTER.model_config(source)) == RELEASED
    folder = resident(tmp_path)
    for name, tensor in native.model.named_parameters():
        assert torch.equal(folder.model.get_parameter(name), tensor), name


def test_a_tensor_that_diffusers_ignores_in_its_old_folders_is_ignored(i2v: Path, tmp_path: Path):
    resident(i2v).model.save_pretrained(tmp_path)  # type: ignore[operator]
    (file,) = tmp_path.glob("*.safetensors")
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(D)}, file)
    assert resident(tmp_path).nbytes == resident(i2v).nbytes


def test_the_patch_embedding_stays_exact_as_in_comfyui(i2v: Path):
    exact, fp8 = resident(i2v), resident(i2v, "float8_e4m3fn", "bfloat16")
    assert torch.equal(
        fp8.model.get_parameter("patch_embedding.weight"), exact.model.get_parameter("patch_embedding.weight")
    )
    assert fp8.model.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.float8_e4m3fn
    assert fp8.nbytes < 0.4 * exact.nbytes


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("vace_patch_embedding.weight", "VACE"),
        ("control_adapter.conv.weight", "Camera"),
        ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("patch_embedding_mask.weight", "SCAIL-2"),
        ("patch_embedding_pose.weight", "SCAIL"),
        ("patch_embedding_global.weight", "WanDancer"),
        ("ref_conv.weight", r"with a reference image \(ref_conv\)"),
    ],
)
def test_relatives_are_refused_by_name(marker: str, name: str):
    infos = {tensor: TensorInfo(shape, torch.float32) for tensor, shape in RELEASED.items()}
    source = Source("model.safetensors", infos | {marker: TensorInfo((1,), torch.float32)}, {}, None, {})
    with pytest.raises(UnsupportedError, match=rf"model.safetensors: Wan {name} is not supported yet"):
        adapter_for(source).model_config(source)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "animate2"), ("model_type", "flow_rvs"), ("causal_ar", True), ("num_heads", 2)]
)
def test_what_the_metadata_changes_is_refused(i2v: Path, tmp_path: Path, key: str, value: object):
    """ComfyUI would build another network from it."""
    metadata = {"config": json.dumps({"transformer": {key: value}})}
    save_file(load_file(i2v), tmp_path / "told.safetensors", metadata=metadata)
    with pytest.raises(UnsupportedError, match=rf"{key} is .* in the file's metadata; only .* is supported"):
        ADAPTER.model_config(open_source(str(tmp_path / "told.safetensors")))


def test_metadata_that_changes_nothing_is_fine(i2v: Path, tmp_path: Path):
    metadata = {"config": json.dumps({"transformer": {"model_type": "i2v", "num_heads": 1, "dim": 128}})}
    save_file(load_file(i2v), tmp_path / "told.safetensors", metadata=metadata)
    source = open_source(str(tmp_path / "told.safetensors"))
    assert ADAPTER.model_config(source) == ADAPTER.model_config(open_source(str(i2v)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_head_dim", 64), ("qk_norm", None), ("cross_attn_norm", False), ("eps", 1e-5), ("freq_dim", 128),
        ("patch_size", [2, 2, 2]),
    ],
)  # fmt: skip
def test_a_diffusers_folder_that_would_be_computed_wrongly_is_refused(tmp_path: Path, key: str, value: object):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", key: value}))
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"{key} is .* in config.json; only .* is supported"):
        ADAPTER.model_config(open_source(str(tmp_path)))


def test_another_wan_class_of_diffusers_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanVACETransformer3DModel"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnsupportedError, match="WanVACETransformer3DModel"):
        adapter_for(open_source(str(tmp_path)))


@pytest.mark.parametrize("lost", ["head.head.weight", "text_embedding.0.weight"])
def test_an_incomplete_checkpoint_is_refused_before_it_is_read(i2v: Path, tmp_path: Path, lost: str):
    tensors = load_file(i2v)
    del tensors[lost]
    save_file(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError, match=f"looks like Wan, but is incomplete.*{lost}"):
        ADAPTER.model_config(open_source(str(tmp_path / "incomplete.safetensors")))


# --- inputs -------------------------------------------------------------------------------------------------------

INPUTS: dict[str, tuple[int, ...]] = {
    "x": (1, 36, 3, 10, 7), "timestep": (1,), "context": (1, 8, 32), "clip_fea": (1, 257, 1280),
}  # fmt: skip


def config_of(tmp_path: Path, variant: str) -> dict[str, Any]:
    return ADAPTER.model_config(written(tmp_path / "model.safetensors", **VARIANTS[variant]))


def test_good_inputs_give_the_number_of_tokens(tmp_path: Path):
    config = config_of(tmp_path, "i2v")
    assert ADAPTER.check_inputs(config, of_shapes(INPUTS)) == 3 * 5 * 4
    per_frame = INPUTS | {"timestep": (1, 3), "denoise_mask": (1, 1, 3, 10, 7)}
    required = {name: INPUTS[name] for name in ("x", "timestep", "context")}
    assert ADAPTER.check_inputs(config, of_shapes(per_frame)) == ADAPTER.check_inputs(config, of_shapes(required)) == 60
    assert ADAPTER.output_shape(config, INPUTS["x"]) == (1, 16, 3, 10, 7)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reference_latent": (1, 16, 10, 7)}, "Wan .* cannot use the input reference_latent yet"),
        ({"time_dim_concat": (1, 36, 1, 10, 7)}, "cannot use the input time_dim_concat yet"),
        ({"vace_context": (1,), "audio_embed": (1,)}, "cannot use the input audio_embed, vace_context yet"),
        ({"context": None}, r"needs a text encoder's conditioning \('context'\)"),
        ({"x": (1, 16, 3, 10, 7)}, r"\[batch, 36, frames, height, width\].* it is \[1, 16, 3, 10, 7\]"),
        ({"x": (1, 36, 10, 7)}, r"it is \[1, 36, 10, 7\]"),
        ({"context": (1, 8, 4096)}, r"shape \[1, 8, 4096\]; this checkpoint needs \[batch, tokens, 32\]"),
        ({"timestep": (1, 2)}, r"one timestep per sample, or one per frame \(3\); got \[1, 2\]"),
        ({"clip_fea": (1, 257, 1024)}, r"shape \[1, 257, 1024\]; this checkpoint needs \[batch, tokens, 1280\]"),
        ({"clip_fea": (1, 515, 1280)}, "has 515 tokens; this checkpoint takes 514"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(
    tmp_path: Path, changes: dict[str, tuple[int, ...] | None], complaint: str
):
    shapes = {name: shape for name, shape in (INPUTS | changes).items() if shape is not None}
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(config_of(tmp_path, "first_and_last_frame"), of_shapes(shapes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_self_checks_example_is_a_legal_uneven_step(tmp_path: Path, variant: str):
    config = config_of(tmp_path, variant)
    for world in (2, 3, 8):
        example = ADAPTER.example(config, world, torch.float32)
        tokens = ADAPTER.check_inputs(config, example)
        assert tokens > world and tokens % world
