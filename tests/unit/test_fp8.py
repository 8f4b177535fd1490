"""FP8: what the node's inputs mean, which layers they mean, and the arithmetic of the layers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.config import SequenceParallelConfig, resolve
from parallel.diffusers.folder import recipe
from parallel.diffusers.tiny import TINY, write_tiny
from parallel.errors import ConfigError, UnsupportedError
from parallel.host.recipe import Recipe
from parallel.host.remote_weights import RemoteWeights
from parallel.quantise.networks import linear_layers
from parallel.quantise.selection import LinearLayer, matches, select_layers
from parallel.quantise.settings import DYNAMIC, SCHEMES, FP8Report, FP8Settings, choose_scheme
from parallel.worker.fp8_linear import E4M3, FP8Linear, become_fp8, quantised, to_fp8
from parallel.worker.split_network import SplitNetwork

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "torchao" / "linear.safetensors")
CPUS = resolve(SequenceParallelConfig(devices="cpu,cpu"))
WORKS = dict.fromkeys(DYNAMIC, "")
NO_ROWS = WORKS | {"dynamic_rowwise": "no such kernel"}
FLUX, WAN = "FluxTransformer2DModel", "WanTransformer3DModel"
NONE = dict.fromkeys(DYNAMIC, "no FP8")
LARGEST = 448.0
"""Of e4m3."""


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"scheme": "int8"}, "scheme is 'int8'; allowed are auto, dynamic_rowwise"), ({"skip": 3}, "skip is 3")],
)
def test_settings_are_checked(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as refusal:
        FP8Settings(**settings)
    assert said in str(refusal.value)


def test_blanks_and_empty_patterns_mean_nothing():
    assert FP8Settings(skip=" img_mlp , ,double_blocks.0,").patterns == ("img_mlp", "double_blocks.0")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("img_mod", "double_blocks.0.img_mod.lin", True),
        ("double_blocks.0", "double_blocks.0.img_mod.lin", True),
        ("double_blocks.0.img_mod.lin", "double_blocks.0.img_mod.lin", True),
        ("blocks.1", "blocks.10.ffn.0", False),
        ("blocks.1", "double_blocks.1.ffn", False),
        ("mod", "double_blocks.0.img_mod.lin", False),
        ("*_mod", "double_blocks.0.img_mod.lin", True),
        ("blocks.1?", "blocks.10.ffn.0", True),
        ("blocks.[12]", "blocks.3.ffn.0", False),
        ("single_blocks.*.linear2", "single_blocks.7.linear2", True),
        ("single_blocks.*.linear2", "single_blocks.7.linear1", False),
    ],
)
def test_a_pattern_means_whole_parts_of_a_name(pattern: str, name: str, expected: bool):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([WORKS, WORKS], "dynamic_rowwise"),
        ([WORKS, NO_ROWS], "dynamic_tensorwise"),
        ([NONE, WORKS], "weight_only"),
    ],
)
def test_auto_is_what_every_device_can_do(found: list[dict[str, str]], expected: str):
    choice = choose_scheme(FP8Settings(skip="a"), CPUS, found)
    assert (choice.scheme, choice.skip) == (expected, ("a",))
    if expected != "dynamic_rowwise":
        assert "cpu: no " in choice.reason


@pytest.mark.parametrize(
    ("scheme", "found", "allowed"),
    [
        ("dynamic_rowwise", [WORKS, NO_ROWS], "auto, dynamic_tensorwise, weight_only"),
        ("dynamic_tensorwise", [NONE, WORKS], "auto, weight_only"),
    ],
)
def test_a_scheme_that_one_device_lacks_is_refused(scheme: str, found: list[dict[str, str]], allowed: str):
    with pytest.raises(ConfigError, match=f"scheme is '{scheme}', which does not work on cpu: no .*{allowed}$"):
        choose_scheme(FP8Settings(scheme=scheme), CPUS, found)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "auto"])
def test_a_scheme_that_all_devices_have_is_honoured(scheme: str):
    assert choose_scheme(FP8Settings(scheme=scheme), CPUS, [WORKS, WORKS]).scheme == scheme


def test_the_report_says_what_was_done():
    counts = {"layers": 17, "already": 0, "skipped": 30, "unfit": 2, "restored": 0}
    report = FP8Report(scheme="weight_only", reason="because", bytes_before=3 * 2**30, bytes_after=2**30, **counts)
    for part in ("weight_only (because)", "17 layers", "30 left", "2 left", "3,072.0 MiB before, 1,024.0 MiB after"):
        assert part in str(report)
    assert "already" not in str(report)
    assert report.to_json()["bytes_after"] == 2**30


# --- which layers -------------------------------------------------------------------------------------------------


def tiny(folder: Path, network: str = FLUX, weight_dtype: torch.dtype | None = None, **options: Any) -> Recipe:
    """Of a tiny model, in bf16 unless `options` say otherwise."""
    write_tiny(folder / "tiny", network, **{"heads": 1, "dtype": torch.bfloat16, **options})
    return recipe(str(folder / "tiny"), SequenceParallelConfig(devices="cpu"), weight_dtype)


def in_worker(recipe: Recipe, scheme: str = "", skip: tuple[str, ...] = ()) -> SplitNetwork:
    """What a worker makes of it, with FP8 if there is a scheme."""
    fp8 = {"scheme": scheme, "skip": list(skip)} if scheme else None
    return SplitNetwork(recipe.to_json(), torch.device("cpu"), lambda done, total: None, fp8=fp8)


def in_fp8(model: SplitNetwork) -> set[str]:
    return {n for n, m in model._network.named_modules() if isinstance(getattr(m, "scale", None), Tensor)}


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic_rowwise", "dynamic_tensorwise"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float32}, {"dtype": torch.float32, "weight_dtype": torch.float16}],
    ids=["bf16", "fp32", "kept as fp16"],
)
def test_the_host_knows_what_the_worker_does(tmp_path: Path, options: dict[str, Any], scheme: str):
    """Before and after are those of a model with and without FP8, and ComfyUI is told them before there is one."""
    made = tiny(tmp_path, **options)
    plain, loaded = in_worker(made), in_worker(made, scheme)
    report = loaded.fp8_report
    assert report is not None
    assert loaded.nbytes + report["saved"] == plain.nbytes
    selection = select_layers(made.linear, scheme=scheme, skip=())
    assert {**report, "saved": selection.saved} == selection.counts | {"restored": 0} == report
    assert selection.weights.keys() == {f"{name}.weight" for name in in_fp8(loaded)}
    assert report["layers"] > 10 and not report["already"]
    if scheme == "weight_only":
        assert RemoteWeights(made).select_fp8(FP8Settings(scheme=scheme)) == selection


@pytest.mark.parametrize("network", TINY)
def test_fp8_is_for_the_blocks_and_not_for_their_modulation(tmp_path: Path, network: str):
    found = RemoteWeights(tiny(tmp_path, network)).select_fp8(FP8Settings(scheme="weight_only"))
    assert found.weights
    for name in found.weights:
        assert re.match(r"\w*blocks\.\d+\.", name) and not re.search("norm|mod", name), name


@pytest.mark.parametrize(
    ("layer", "stays"),
    [
        ("double_blocks.0.img_mod.lin", True),
        ("blocks.0.mod_x", True),  # Mochi
        ("double_layers.0.modC.1", True),  # AuraFlow
        ("blocks.0.norm1.linear", True),  # CogVideoX
        ("double_stream_layers.0.img_norm1.linear", True),  # Boogu
        ("transformer_blocks.0.norm1_context.linear", True),  # diffusers
        ("layers.0.adaLN_modulation.1", True),
        ("blocks.0.self_attn.q", False),
        ("single_transformer_blocks.0.proj_mlp", False),
        ("single_blocks.0.linear1", False),
    ],
)
def test_modulations_are_known_by_their_names(layer: str, stays: bool):
    module: nn.Module = nn.Linear(16, 16)
    for part in reversed(layer.split(".")):
        number = int(part) if part.isdigit() else None
        holder = nn.Module() if number is None else nn.ModuleList(nn.Identity() for _ in range(number))
        holder.add_module(part, module)
        module = holder
    (found,) = linear_layers(module, [layer.partition(".")[0]], {f"{layer}.weight": torch.bfloat16})
    assert (found.name, found.stays) == (layer, stays)


def test_what_is_in_fp8_already_is_taken_over_by_schemes_that_multiply_in_it():
    layers = [
        LinearLayer("blocks.0.a", (32, 16), 1, is_fp8=True, stays=False),
        LinearLayer("blocks.0.b", (32, 16), 2, is_fp8=False, stays=False),
    ]
    weight_only, rowwise = (select_layers(layers, scheme=s, skip=()) for s in ("weight_only", "dynamic_rowwise"))
    assert (list(weight_only.weights), weight_only.already) == (["blocks.0.b.weight"], 1)
    assert weight_only.saved == 32 * 16 - 4 * 32
    assert (len(rowwise.weights), rowwise.already, rowwise.saved) == (2, 0, 32 * 16 - 2 * 4 * 32)


def test_a_quantised_file_is_refused_by_name(tmp_path: Path):
    made = replace(tiny(tmp_path), quantised="nvfp4")
    with pytest.raises(UnsupportedError, match=r"cannot quantise FluxTransformer2DModel .*already \(nvfp4\)"):
        RemoteWeights(made).select_fp8(FP8Settings())


@pytest.mark.parametrize("pattern", ["ff", "transformer_blocks.*.ff", "net"])
def test_skipped_layers_stay_as_they_are(tmp_path: Path, pattern: str):
    """Named as in the network."""
    made = tiny(tmp_path, num_layers=1)
    loaded, plain = in_worker(made, "weight_only", (pattern,)), in_worker(made)
    left = {f"transformer_blocks.0.{name}" for name in ("ff.net.0.proj", "ff.net.2")}
    if pattern == "net":
        left |= {f"transformer_blocks.0.{name}" for name in ("ff_context.net.0.proj", "ff_context.net.2")}
    assert in_fp8(in_worker(made, "weight_only")) - in_fp8(loaded) == left
    for name in left:
        weights = [each._network.get_parameter(f"{name}.weight") for each in (loaded, plain)]
        assert torch.equal(*weights)


@pytest.mark.parametrize("pattern", ["to_qq", "blocks.77"])
def test_a_pattern_that_means_nothing_is_named(tmp_path: Path, pattern: str):
    weights = RemoteWeights(tiny(tmp_path))
    with pytest.raises(ConfigError, match=rf"skip has the pattern '{pattern}', which fits no linear layer.*_blocks\.0"):
        weights.select_fp8(FP8Settings(skip=f"to_q, {pattern}"))


@pytest.mark.parametrize(
    ("scheme", "shape", "fits"),
    [
        ("int8_convrot", (3, 48), True),
        ("int8_convrot", (48, 40), False),
        ("mxfp8", (64, 96), True),
        ("mxfp8", (48, 96), False),
        ("nvfp4", (48, 96), True),
        ("nvfp4", (48, 40), False),
    ],
)
def test_layers_whose_sizes_comfy_kitchen_cannot_take_are_left(scheme: str, shape: tuple[int, int], fits: bool):
    selection = select_layers([LinearLayer("a", shape, 2, is_fp8=False, stays=False)], scheme=scheme, skip=())
    assert (len(selection.weights), selection.unfit) == (int(fits), int(not fits))


def test_comfyuis_formats_are_refused_for_a_model_of_another_library(tmp_path: Path):
    weights = RemoteWeights(tiny(tmp_path))
    with pytest.raises(UnsupportedError, match="scheme nvfp4 is ComfyUI's"):
        weights.select_fp8(FP8Settings(scheme="nvfp4"))


@pytest.mark.parametrize(("scheme", "unfit"), [("dynamic_rowwise", 6), ("dynamic_tensorwise", 6), ("weight_only", 0)])
def test_layers_of_odd_sizes_are_left_by_the_dynamic_schemes(tmp_path: Path, scheme: str, unfit: int):
    """Two layers in each of three blocks."""
    made = tiny(tmp_path, WAN, ffn_dim=200)
    found, loaded = select_layers(made.linear, scheme=scheme, skip=()), in_worker(made, scheme)
    assert found.unfit == unfit
    assert ("blocks.0.ffn.net.2" in in_fp8(loaded)) is not bool(unfit)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_dynamic_schemes_are_refused_without_a_gpu(tmp_path: Path, scheme: str):
    with pytest.raises(
        ConfigError, match=rf"scheme is '{scheme}', which does not work on cpu: CPUs do not compute in FP8"
    ):
        RemoteWeights(tiny(tmp_path)).select_fp8(FP8Settings(scheme=scheme))


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_old_gpus_are_refused_by_their_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda:0": (9, 0)}.get(device, capability))
    weights = RemoteWeights(replace(tiny(tmp_path), config=SequenceParallelConfig(devices="cuda:0,cuda:1")))
    if capability < (8, 9):
        with pytest.raises(ConfigError, match=r"cuda:1: compute capability 8\.6, but FP8 multiplication needs 8\.9"):
            weights.select_fp8(FP8Settings(scheme="dynamic_rowwise"))
    else:
        assert weights.select_fp8(FP8Settings(scheme="dynamic_rowwise")).weights


# --- arithmetic ---------------------------------------------------------------------------------------------------


def linear(scheme: str, weight: Tensor, bias: Tensor | None, scale: float | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    become_fp8(layer, scheme)
    for name, values in zip(("weight", "scale"), quantised(scheme, weight, scale), strict=True):
        assert values.shape == getattr(layer, name).shape
        layer._parameters[name] = nn.Parameter(values, requires_grad=False)
    return layer


def rounded(x: Tensor, rowwise: bool) -> Tensor:
    """x as FP8 has it, in fp32: each row, or all, scaled to 448 and back. Rows of zeros stay so."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True) if rowwise else x.abs().amax()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / LARGEST
    return (x / scale).to(E4M3).float() * scale


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((3, 11, 96), (64, 96), (64,)))
    x[1, 2] *= 50
    x[2, 5] = 0
    weight[7] = 0
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", DYNAMIC)
def test_a_dynamic_layer_is_the_product_of_what_both_are_rounded_to(scheme: str, dtype: torch.dtype):
    """`torch._scaled_mm` on the CPU against fp32; the result is rounded to bf16."""
    x, weight, bias = inputs(dtype)
    rowwise = scheme == "dynamic_rowwise"
    expected = F.linear(rounded(x.flatten(0, 1), rowwise), rounded(weight, rowwise), bias.float()).view(3, 11, 64)
    found = linear(scheme, weight, bias)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-8 * expected.abs().max().item())
    exact = F.linear(x.float(), weight.float(), bias.float())
    small = [0, 2]  # without the large token, whose error would hide that of the others
    assert (found.float() - exact)[small].norm() <= (0.05 if rowwise else 0.3) * exact[small].norm()


def test_activations_that_lie_across_memory_are_laid_out_in_rows():
    """As GPUs want them."""
    x = inputs(torch.bfloat16)[0].flatten(0, 1)
    data, scale = to_fp8(x.t().contiguous().t(), rowwise=True)
    expected, expected_scale = to_fp8(x, rowwise=True)
    assert data.is_contiguous() and torch.equal(data.float(), expected.float()) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("scheme", ["dynamic_rowwise", "weight_only"])
def test_a_token_does_not_depend_on_the_others(scheme: str):
    """So the split over ranks does not change the result."""
    x, weight, bias = inputs(torch.bfloat16)
    layer = linear(scheme, weight, bias)
    torch.testing.assert_close(layer(x)[1:2, 4:6], layer(x[1:2, 4:6]), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("scheme", [*DYNAMIC, "weight_only"])
def test_no_tokens_are_no_result(scheme: str):
    """As a rank has them that owns none of the text."""
    x, weight, bias = inputs(torch.bfloat16)
    assert linear(scheme, weight, bias)(x[:, :0]).shape == (3, 0, 64)


@pytest.mark.parametrize("scheme", [*DYNAMIC, "weight_only"])
def test_results_are_those_of_torchao(scheme: str):
    x, weight, bias = GOLDEN["x"], GOLDEN["weight"], GOLDEN["bias"]
    layer = linear(scheme, weight, bias)
    assert isinstance(layer, FP8Linear) is (scheme in DYNAMIC)
    expected_scale = GOLDEN[f"{scheme}.scale"]  # torchao divides in bf16
    torch.testing.assert_close(layer.scale, expected_scale, rtol=2**-8, atol=0)
    true, expected = layer.weight.float() * layer.scale, GOLDEN[f"{scheme}.data"].float() * expected_scale
    torch.testing.assert_close(true, expected, rtol=2**-3, atol=0)
    out, expected = layer(x).float(), GOLDEN[f"{scheme}.out"].float()
    assert (out - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_fp8_values_of_a_file_are_taken_over_as_they_are(scheme: str):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).to(E4M3)
    layer = linear(scheme, weight, None, 0.25)
    assert layer.weight.dtype == E4M3 and torch.equal(layer.weight.float() * layer.scale, weight.float() * 0.25)


def test_e5m2_values_of_a_file_are_rounded_anew():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).to(torch.float8_e5m2)
    layer = linear("dynamic_rowwise", weight, None, 0.25)
    assert layer.weight.dtype == E4M3
    torch.testing.assert_close(layer.weight.float() * layer.scale, weight.float() * 0.25, rtol=2**-4, atol=1e-3)
