"""HunyuanVideo's adapter: checkpoints, inputs, and what is refused. The result of a step is tested in distributed/."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.adapters.hunyuan_video import HunyuanVideoAdapter
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import random_tensors, tiny_config, write_tiny_hunyuan_video
from parallel.errors import CheckpointError, UnsupportedError
from parallel.worker.resident import ResidentModel
from tests.unit.inputs import of_shapes

ADAPTER = HunyuanVideoAdapter()
TINY: dict[str, Any] = {
    "heads": 1, "depth": 1, "depth_single": 1, "context_dim": 32, "in_channels": 16, "guidance": True,
}  # fmt: skip
VARIANTS = {
    "tiny": TINY,
    "deeper": TINY | {"heads": 2, "depth": 2, "depth_single": 3},
    "no_guidance": TINY | {"guidance": False},
    "image_to_video": TINY | {"in_channels": 33},
    "full_size": TINY | {"heads": 24, "depth": 20, "depth_single": 40, "context_dim": 4096},
}
NAMES = ("comfyui", "original")


def build(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name → shape of every parameter of diffusers' own model."""
    model_class = ADAPTER.model_class()
    with torch.device("meta"):
        return {name: p.shape for name, p in model_class(**config).named_parameters()}


def resident(path: Path, storage: str = "float32", compute: str = "float32") -> ResidentModel:
    recipe = {"path": str(path), "weight_dtype": storage, "compute_dtype": compute}
    return ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)


def source_of(names: list[str]) -> Source:
    """A single file with these tensors."""
    info = TensorInfo((128, 128), torch.float32)
    return Source("model.safetensors", dict.fromkeys(names, info), {}, None, {})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in both dialects."""
    folder = tmp_path_factory.mktemp("models")
    paths = {names: folder / f"{names}.safetensors" for names in NAMES}
    for names, path in paths.items():
        write_tiny_hunyuan_video(path, names=names, **TINY)
    return paths


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_native_tensors_become_every_parameter_exactly_once(variant: str):
    config = tiny_config(**VARIANTS[variant])
    filled: dict[str, torch.Size] = {}
    for name, shape in ADAPTER.native_tensors(config).items():
        for piece in ADAPTER.pieces(name, shape, config):
            assert piece.name not in filled, f"{piece.name} is filled twice"
            filled[piece.name] = piece.take(torch.empty(shape, device="meta")).shape
    assert filled == build(config)


def test_no_row_of_a_native_tensor_is_lost_or_used_twice():
    config = tiny_config(**TINY)
    for name, shape in ADAPTER.native_tensors(config).items():
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        taken = [piece.take(tensor).flatten() for piece in ADAPTER.pieces(name, shape, config)]
        assert torch.equal(torch.cat(taken).sort().values, tensor.flatten()), name


def test_the_two_dialects_differ_and_mean_the_same(files: dict[str, Path]):
    ours, theirs = (load_file(files[names]) for names in NAMES)
    assert len(set(ours) - set(theirs)) > 20
    assert {"double_blocks.0.img_attn_qkv.weight", "time_in.mlp.0.weight"} <= set(theirs)
    comfyui, original = (resident(files[names]).model.state_dict() for names in NAMES)
    assert set(comfyui) == set(original)
    for name, tensor in comfyui.items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", ["tiny", "deeper", "no_guidance", "image_to_video"])
def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path, variant: str, prefix: str, names: str):
    path = tmp_path / "model.safetensors"
    config = write_tiny_hunyuan_video(path, names=names, prefix=prefix, **VARIANTS[variant])
    source = open_source(str(path))
    adapter = adapter_for(source)
    assert isinstance(adapter, HunyuanVideoAdapter)
    assert adapter.model_config(source) == config


def test_a_diffusers_folder_gives_the_same_parameters(files: dict[str, Path], tmp_path: Path):
    native = resident(files["comfyui"])
    native.model.save_pretrained(tmp_path, max_shard_size="2MB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = open_source(str(tmp_path))
    assert isinstance(adapter_for(source), HunyuanVideoAdapter)
    folder = resident(tmp_path)
    assert ADAPTER.model_config(source).items() >= native.config.items()
    assert folder.nbytes == native.nbytes
    for name, tensor in native.model.state_dict().items():
        assert torch.equal(folder.model.state_dict()[name], tensor), name


def test_weights_are_rounded_to_the_storage_dtype(files: dict[str, Path]):
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    exact = resident(files["comfyui"]).model.get_parameter(name)
    rounded = resident(files["comfyui"], "bfloat16").model.get_parameter(name)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.bfloat16().float())
    assert not torch.equal(rounded, exact)


def test_fp8_weights_stay_fp8(files: dict[str, Path]):
    full, fp8 = resident(files["comfyui"]), resident(files["comfyui"], "float8_e4m3fn")
    dtypes = Counter(p.dtype for p in fp8.model.parameters() if p.ndim > 1)
    assert dtypes[torch.float8_e4m3fn] > 0.9 * dtypes.total()
    assert fp8.nbytes < 0.3 * full.nbytes


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    ["cond_type_embedding.weight", "byt5_in.fc1.weight", "vision_in.proj.0.weight", "time_r_in.in_layer.weight"],
)
def test_relatives_of_the_family_are_not_mistaken_for_it(extra: str):
    names = [*ADAPTER.native_tensors(tiny_config(**TINY)), extra]
    with pytest.raises(UnsupportedError, match=r"model.safetensors is not supported yet .* HunyuanVideo;"):
        adapter_for(source_of(names))


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["input_blocks.0.0.weight", "middle_block.1.proj_in.weight"],  # Stable Diffusion
        ["cond_seq_linear.weight", "double_layers.0.attn.w1q.weight"],  # AuraFlow
    ],
)
def test_other_families_are_refused(names: list[str]):
    with pytest.raises(UnsupportedError, match=r"tensor names are of no known family.*supported families"):
        adapter_for(source_of(names))


def write_folder(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    return str(folder)


def test_a_diffusers_folder_of_another_class_is_named(tmp_path: Path):
    path = write_folder(tmp_path, {"_class_name": "AllegroTransformer3DModel"})
    with pytest.raises(UnsupportedError, match="AllegroTransformer3DModel"):
        adapter_for(open_source(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_head_dim", 64),
        ("qk_norm", "layer_norm"),
        ("rope_theta", 10000.0),
        ("rope_axes_dim", [32, 48, 48]),
    ],
)
def test_a_diffusers_folder_that_would_be_computed_wrongly_is_refused(tmp_path: Path, key: str, value: object):
    path = write_folder(tmp_path, {"_class_name": "HunyuanVideoTransformer3DModel", key: value})
    with pytest.raises(UnsupportedError, match=r"is .* in config.json; only .* is supported"):
        ADAPTER.model_config(open_source(path))


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_a_diffusers_folder_for_image_to_video_is_an_ordinary_model(tmp_path: Path, kind: str):
    """Which kind it is shows in the inputs; diffusers' own modules for it would expect them in another form."""
    plain = {"_class_name": "HunyuanVideoTransformer3DModel"}
    config = ADAPTER.model_config(open_source(write_folder(tmp_path, plain)))
    assert ADAPTER.model_config(open_source(write_folder(tmp_path, plain | {"image_condition_type": kind}))) == config


@pytest.mark.parametrize("lost", ["txt_in.input_embedder.weight", "final_layer.linear.weight"])
def test_an_incomplete_checkpoint_is_refused_before_it_is_read(files: dict[str, Path], tmp_path: Path, lost: str):
    tensors = load_file(files["comfyui"])
    del tensors[lost]
    save_file(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError, match=f"looks like HunyuanVideo, but is incomplete.*{lost}"):
        ADAPTER.model_config(open_source(str(tmp_path / "incomplete.safetensors")))


def test_a_lost_weight_is_named_when_loading(files: dict[str, Path], tmp_path: Path):
    tensors = load_file(files["comfyui"])
    del tensors["single_blocks.0.linear2.bias"]
    save_file(tensors, tmp_path / "lost.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* single_transformer_blocks.0.proj_out.bias"):
        resident(tmp_path / "lost.safetensors")


def test_a_tensor_without_a_place_is_named_when_loading(files: dict[str, Path], tmp_path: Path):
    save_file(load_file(files["comfyui"]) | {"stray.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"'stray.weight' has no place in hunyuan_video"):
        resident(tmp_path / "more.safetensors")


def test_a_tensor_of_the_wrong_shape_is_named_when_loading(files: dict[str, Path], tmp_path: Path):
    name = "double_blocks.0.img_attn.proj.bias"
    save_file(load_file(files["comfyui"]) | {name: torch.zeros(64)}, tmp_path / "shape.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}' gives .* the shape \[64\], but .* needs \[128\]"):
        resident(tmp_path / "shape.safetensors")


# --- inputs -------------------------------------------------------------------------------------------------------

CONFIG = tiny_config(**TINY)
INPUTS: dict[str, tuple[int, ...]] = {
    "x": (1, 16, 3, 10, 6), "timestep": (1,), "context": (1, 8, 32), "y": (1, 768), "guidance": (1,),
    "attention_mask": (1, 8),
}  # fmt: skip


def test_good_inputs_give_the_number_of_tokens():
    assert ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS)) == 3 * 5 * 3
    required = {name: INPUTS[name] for name in ("x", "timestep", "context", "y")}
    assert ADAPTER.check_inputs(CONFIG, of_shapes(required)) == 45
    long = INPUTS | {"y": (1, 2048)}  # ComfyUI takes the first 768, so do we
    assert ADAPTER.check_inputs(CONFIG, of_shapes(long)) == 45


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ref_latent": (1, 16, 1, 2, 2)}, "cannot use the input ref_latent .guidance_type custom"),
        ({"refs.0": (1, 16, 1, 2, 2), "control": (1,)}, "cannot use the input control, refs.0 yet"),
        ({"context": None}, r"needs a text encoder's conditioning \('context'\)"),
        ({"y": None}, r"needs the pooled output of CLIP-L \('y'\)"),
        ({"y": (1, 512)}, r"pooled conditioning has the shape \[1, 512\]; this checkpoint needs \[batch, 768\]"),
        ({"x": (1, 4, 3, 10, 6)}, r"\[batch, 16, frames, height, width\].* it is \[1, 4, 3, 10, 6\]"),
        ({"x": (1, 16, 10, 6)}, r"it is \[1, 16, 10, 6\]"),
        ({"x": (1, 16, 3, 9, 6)}, "latent height is 9; HunyuanVideo needs a multiple of 2"),
        ({"x": (1, 16, 3, 10, 7)}, "latent width is 7; HunyuanVideo needs a multiple of 2"),
        ({"context": (1, 8, 4096)}, r"shape \[1, 8, 4096\]; this checkpoint needs \[batch, tokens, 32\]"),
        ({"context": (8, 32)}, r"shape \[8, 32\]"),
        ({"timestep": (1, 3)}, r"one timestep per sample; got \[1, 3\]"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...] | None], complaint: str):
    shapes = {name: shape for name, shape in (INPUTS | changes).items() if shape is not None}
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(CONFIG, of_shapes(shapes))


def test_a_floating_point_mask_is_refused():
    with pytest.raises(UnsupportedError, match="attention_mask is floating-point"):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS) | {"attention_mask": torch.zeros(1, 8)})


def test_padding_is_trimmed_but_counts_in_the_mean():
    context = torch.randn(2, 8, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0]] * 2)
    (prompts,) = ADAPTER.prepare({"context": context, "y": torch.zeros(2, 768), "attention_mask": mask})
    assert torch.equal(prompts.text, context[:, [0, 1, 2, 5]])
    torch.testing.assert_close(prompts.text_mean, context.mean(dim=1))


def test_texts_of_unequal_length_run_one_by_one():
    context = torch.randn(2, 4, 32)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    prompts = ADAPTER.prepare({"context": context, "y": torch.zeros(2, 768), "attention_mask": mask})
    assert [tuple(prompt.text.shape) for prompt in prompts] == [(1, 3, 32), (1, 1, 32)]
    assert [prompt.rows for prompt in prompts] == [slice(0, 1), slice(1, 2)]


def test_the_self_checks_example_is_a_legal_step():
    for world in (2, 3, 8):
        example = ADAPTER.example(CONFIG, world, torch.float32)
        assert ADAPTER.check_inputs(CONFIG, example) > world


def test_a_seed_gives_the_same_weights():
    first, again = (random_tensors(ADAPTER, CONFIG, seed=3) for _ in range(2))
    other = random_tensors(ADAPTER, CONFIG, seed=4)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())
