"""FP8 weights in the workers: as exact as FP8 is, the same on any number of ranks, patched by LoRAs, and gone again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.host import quantising, remote_weights
from parallel.host.remote_model import RemoteModel
from parallel.quantise.settings import FP8Choice, FP8Settings
from tests.distributed.devices import kind
from tests.distributed.test_weights import change, write_changed
from tests.distributed.tiny_models import (
    Inputs,
    StartGroup,
    TinyModels,
    WanInputs,
    recipe_of,
    relative_difference,
)
from tests.thinned import one_in

TWO = "cpu,cpu"
FP32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
MODELS: dict[str, tuple[dict[str, Any], Inputs | WanInputs]] = {
    "hunyuan_video": ({}, Inputs(valid=(5,))),
    "flux": ({"family": "flux"}, Inputs(frames=None, height=10, sigma=True)),
    "wan": ({"family": "wan", "context_dim": 64}, WanInputs(height=10)),
}
NAMES = [f"double_blocks.0.{name}" for name in ("img_attn.qkv.weight", "txt_mlp.0.weight", "img_mod.lin.weight")]
WEIGHT_ONLY = FP8Settings(scheme="weight_only")
ROWWISE = FP8Settings(scheme="dynamic_rowwise")
TENSORWISE = FP8Settings(scheme="dynamic_tensorwise")


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU workers run the dynamic schemes, which PyTorch emulates there."""

    def as_asked(fp8: FP8Settings, *others: Any) -> FP8Choice:
        return FP8Choice(scheme=fp8.scheme, skip=fp8.patterns)

    monkeypatch.setattr(quantising, "choose_scheme", as_asked)
    monkeypatch.setattr(remote_weights, "refuse_devices", lambda *_: None)


@contextmanager
def model_on(
    start_group: StartGroup, path: Path, devices: str, dtype: torch.dtype = FP32, weights: str = "replicate"
) -> Iterator[RemoteModel]:
    recipe = replace(recipe_of(path, devices, dtype, weights=weights), compute_dtype=FP32 if dtype == E4M3 else dtype)
    model = RemoteModel(recipe, group=start_group(devices))
    try:
        yield model
    finally:
        model.unload()


def step(model: RemoteModel, inputs: Inputs | WanInputs, fp8: FP8Settings | None) -> Tensor:
    model.ensure_loaded(fp8=fp8)
    x, timestep, conditioning = inputs.make()
    dtype = model.recipe.compute_dtype
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in conditioning.items()}
    return model.step(x.to(dtype), timestep, given)


def l2(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_weight_only_is_within_5_percent_and_alike_on_any_number_of_ranks(
    start_group: StartGroup, tiny_models: TinyModels, name: str
):
    checkpoint, inputs = MODELS[name]
    path = tiny_models.path(**checkpoint)
    with model_on(start_group, path, "cpu") as model:
        plain, single = step(model, inputs, None), step(model, inputs, WEIGHT_ONLY)
        report = model.fp8_report
    assert report is not None and report.layers > 0
    assert report.bytes_after < 0.8 * report.bytes_before
    print(f"{name}: relative L2 error {l2(single, plain):.4f}; {report}")
    assert 1e-3 < l2(single, plain) <= 0.05
    for devices in (TWO, "cpu,cpu,cpu"):
        with model_on(start_group, path, devices) as model:
            split = step(model, inputs, WEIGHT_ONLY)
            print(f"{name} on {devices}: {relative_difference(split, single):.2g}")
            assert relative_difference(split, single) <= kind().reference


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.cpu_ranks("products in FP8, emulated")
@pytest.mark.parametrize(("name", "dtype"), one_in(4, [("flux", BF16), *((name, FP32) for name in MODELS)]))
def test_dynamic_schemes_hold_on_two_ranks(
    start_group: StartGroup, tiny_models: TinyModels, name: str, dtype: torch.dtype
):
    """Row-wise gives what one process gives, but for values at the edge between two FP8 numbers; tensor-wise scales
    are those of a rank's tokens."""
    checkpoint, inputs = MODELS[name]
    path = tiny_models.path(**checkpoint)
    found: dict[str, list[Tensor]] = {}
    for devices in ("cpu", TWO):
        with model_on(start_group, path, devices, dtype) as model:
            found[devices] = [step(model, inputs, fp8) for fp8 in (None, ROWWISE, TENSORWISE)]
    plain, rowwise, tensorwise = found["cpu"]
    _, split_rowwise, split_tensorwise = found[TWO]
    print(
        name, dtype, *(f"{l2(result, plain):.4f}" for result in (rowwise, tensorwise, split_rowwise, split_tensorwise))
    )
    print(f"row-wise on two ranks and on one: {l2(split_rowwise, rowwise):.2g}")
    assert l2(split_rowwise, rowwise) <= 0.01
    for result in (rowwise, tensorwise, split_rowwise, split_tensorwise):
        assert 1e-3 < l2(result, plain) <= 0.08


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.cpu_ranks("products in FP8, emulated")
@pytest.mark.parametrize(
    ("checkpoint", "dtype", "fp8"),
    [
        pytest.param({"dtype": BF16}, BF16, WEIGHT_ONLY, id="bf16"),
        pytest.param({"dtype": BF16}, BF16, ROWWISE, id="bf16_dynamic"),
        pytest.param({"scaled": "comfy_quant"}, FP32, WEIGHT_ONLY, id="scaled_fp8"),
        pytest.param({"scaled": "comfy_quant"}, FP32, ROWWISE, id="scaled_fp8_dynamic", marks=pytest.mark.extended),
        pytest.param({"dtype": E4M3}, E4M3, ROWWISE, id="fp8_dynamic", marks=pytest.mark.extended),
    ],
)
def test_patched_weights_are_quantised_again(
    start_group: StartGroup,
    tiny_models: TinyModels,
    tmp_path: Path,
    checkpoint: dict[str, Any],
    dtype: torch.dtype,
    fp8: FP8Settings,
):
    """A LoRA on FP8 weights gives what the merged file in FP8 gives; without it, and without FP8, all is as before."""
    path, inputs = tiny_models.path("flux", **checkpoint), MODELS["flux"][1]
    changed = tmp_path / "changed.safetensors"
    names = write_changed(path, changed, dtype)
    with model_on(start_group, changed, TWO, dtype) as merged:
        expected = step(merged, inputs, fp8)
    with model_on(start_group, path, TWO, dtype) as model:
        plain, base = step(model, inputs, None), step(model, inputs, fp8)
        model.replace_weights("changed", names, change)
        patched = step(model, inputs, fp8)
        model.replace_weights(None, (), change)
        restored = step(model, inputs, fp8)
        without = step(model, inputs, None)
    assert torch.equal(patched, expected)
    assert torch.equal(restored, base)
    assert torch.equal(without, plain)
    assert relative_difference(patched, base) > 1e-2
    if checkpoint == {"dtype": BF16} or fp8 == ROWWISE:
        assert relative_difference(base, plain) > 1e-3
    else:  # in FP8 already
        assert torch.equal(base, plain)


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.cpu_ranks("products in FP8, emulated")
@pytest.mark.parametrize(
    ("scheme", "weights"),
    one_in(3, [("weight_only", "shard"), ("dynamic_tensorwise", "shard"), ("dynamic_rowwise", "offload")]),
)
def test_shared_out_weights_are_the_same_ones(
    start_group: StartGroup, tiny_models: TinyModels, scheme: str, weights: str
):
    """Each rank quantises its rows only, but for tensor-wise scales; a LoRA changes them there."""
    path, inputs, fp8 = tiny_models.path("flux", dtype=BF16), MODELS["flux"][1], FP8Settings(scheme=scheme)
    found = {}
    for mode in ("replicate", weights):
        with model_on(start_group, path, TWO, BF16, mode) as model:
            first = step(model, inputs, fp8)
            model.replace_weights("changed", NAMES, change)
            second = step(model, inputs, fp8)
            model.replace_weights(None, (), change)
            found[mode] = [first, second, step(model, inputs, fp8)]
            report = model.fp8_report
        assert report is not None and report.bytes_after < 0.8 * report.bytes_before
    assert all(torch.equal(a, b) for a, b in zip(found["replicate"], found[weights], strict=True))
    first, second, third = found[weights]
    assert torch.equal(first, third) and relative_difference(second, first) > 1e-2


def test_skipped_layers_take_part_as_they_are(start_group: StartGroup, tiny_models: TinyModels):
    path, inputs = tiny_models.path("flux"), MODELS["flux"][1]
    with model_on(start_group, path, TWO) as model:
        plain = step(model, inputs, None)
        some = step(model, inputs, FP8Settings(scheme="weight_only", skip="double_blocks, single_blocks.*.linear1"))
        assert model.fp8_report is not None and model.fp8_report.layers == 1
        none = step(model, inputs, FP8Settings(scheme="weight_only", skip="double_blocks, single_blocks"))
        assert model.fp8_report.layers == 0
    assert torch.equal(none, plain)
    assert 0 < l2(some, plain) < 0.03


@pytest.mark.cpu_ranks("what auto chooses on CPUs")
def test_auto_is_weight_only_without_gpus_and_says_so(start_group: StartGroup, tiny_models: TinyModels):
    path, inputs = tiny_models.path("flux"), MODELS["flux"][1]
    with model_on(start_group, path, TWO) as model:
        automatic = step(model, inputs, FP8Settings())
        assert "weight_only (chosen because cpu: CPUs do not compute in FP8)" in str(model.fp8_report)
        assert torch.equal(step(model, inputs, WEIGHT_ONLY), automatic)
        with pytest.raises(ConfigError, match="scheme is 'dynamic_rowwise', which does not work on cpu"):
            model.ensure_loaded(fp8=ROWWISE)
        assert torch.equal(step(model, inputs, WEIGHT_ONLY), automatic), "what was loaded is still there"
        with pytest.raises(ConfigError, match="skip has the pattern 'nothing'"):
            model.ensure_loaded(fp8=FP8Settings(skip="nothing"))
        assert torch.equal(step(model, inputs, FP8Settings()), automatic)
