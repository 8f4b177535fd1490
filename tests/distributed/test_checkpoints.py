"""Checkpoints in the kinds that users have: each gives what the same weights in fp32 give, and takes its own memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.demo.checkpoint import SCALED_LAYOUTS
from parallel.worker.resident import ResidentModel
from parallel.worker.scaled_linear import ScaledLinear
from tests.distributed.tiny_models import (
    Inputs,
    StartGroup,
    TinyModels,
    loaded,
    recipe_of,
    relative_difference,
)

TWO = "cpu,cpu"
FAMILIES = {
    "hunyuan_video": Inputs(valid=(5,)),
    "flux": Inputs(frames=None, sigma=True),
}
DIALECTS: dict[str, list[dict[str, Any]]] = {
    "hunyuan_video": [{}, {"names": "original", "prefix": "model.diffusion_model."}],
    "flux": [{}, {"prefix": "model.diffusion_model."}],
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def predict(group: Any, path: Path, family: str, **recipe: Any) -> tuple[Tensor, int]:
    """A step on the group, and the bytes of weights on one worker."""
    with loaded(group, path, **recipe) as remote:
        return remote.step(*FAMILIES[family].make()), remote.nbytes


def resident(path: Path, **dtypes: str) -> ResidentModel:
    recipe = recipe_of(path, "cpu").to_json() | dtypes
    return ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_scaled_fp8_gives_what_its_true_weights_give(
    start_group: StartGroup, tiny_models: TinyModels, family: str, layout: str
):
    group = start_group(TWO)
    twin, whole = predict(group, tiny_models.path(family, scaled="dequantised"), family)
    for dialect in DIALECTS[family]:
        actual, kept = predict(group, tiny_models.path(family, scaled=layout, **dialect), family)
        assert torch.equal(actual, twin)
        assert kept < whole / 3  # 8 bits instead of 32, but for a few
    rounded_away = relative_difference(twin, predict(group, tiny_models.path(family), family)[0])
    assert 1e-3 < rounded_away < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_fp8_stays_so_whatever_weight_dtype_says(start_group: StartGroup, tiny_models: TinyModels, family: str):
    """Else the biases and norms, which the file keeps apart, would be rounded, too."""
    path = tiny_models.path(family, scaled="comfy_quant")
    expected = predict(start_group(TWO), path, family)
    for dtype in FP8:
        actual = predict(start_group(TWO), path, family, weight_dtype=dtype)
        assert torch.equal(actual[0], expected[0]) and actual[1] == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_fp8_in_bf16_arithmetic(tiny_models: TinyModels, family: str):
    """The scale is applied unrounded: a weight in use is the true one, rounded once."""
    model = resident(tiny_models.path(family, scaled="marker_2"), weight_dtype="bfloat16", compute_dtype="bfloat16")
    true = resident(tiny_models.path(family, scaled="dequantised"), weight_dtype="bfloat16", compute_dtype="bfloat16")
    layers = [
        (layer, true.model.get_submodule(name))
        for name, layer in model.model.named_modules()
        if isinstance(layer, ScaledLinear)
    ]
    assert len(layers) > 20
    for layer, twin in layers:
        identity = torch.eye(layer.in_features, dtype=torch.bfloat16)
        layer.bias = twin.bias = None
        assert torch.equal(layer(identity), twin(identity))


def test_a_scaled_weight_gives_way_to_another_one_and_comes_back(tiny_models: TinyModels):
    model = resident(tiny_models.path("flux", scaled="comfy_quant"))
    name = "single_transformer_blocks.0.proj_mlp"
    layer = model.model.get_submodule(name)
    assert isinstance(layer, ScaledLinear)
    x, before = torch.ones(1, layer.in_features), layer.weight.clone()
    scale, expected = layer.scale, layer(x)
    model.set_parameter(f"{name}.weight", torch.full(layer.weight.shape, 2.0).to(FP8[0]), 0.25)
    assert torch.allclose(layer(x), 0.5 * x.sum() + layer.bias)
    model.set_parameter(f"{name}.weight", before, scale)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_another_dtype(
    start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, family: str, dtype: torch.dtype
):
    """It gives exactly what an fp32 file of its values gives; fp8 also where it is kept so."""
    path = tiny_models.path(family, dtype=dtype)
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, tmp_path / "twin.safetensors")
    twin, whole = predict(start_group(TWO), tmp_path / "twin.safetensors", family)
    assert torch.equal(predict(start_group(TWO), path, family)[0], twin)
    if dtype in FP8:
        actual, kept = predict(start_group(TWO), path, family, weight_dtype=dtype)
        assert torch.equal(actual, twin)
        assert kept < whole / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_diffusers_folder(start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, family: str):
    """As `save_pretrained` writes it, several files and their index: the same as the single file."""
    single = tiny_models.path(family)
    resident(single).model.save_pretrained(tmp_path, max_shard_size="4MB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    expected = predict(start_group(TWO), single, family)[0]
    assert torch.equal(predict(start_group(TWO), tmp_path, family)[0], expected)
