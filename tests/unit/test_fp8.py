"""FP8: what the node's inputs mean, which layers they mean, and the arithmetic of the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.config import SequenceParallelConfig, resolve
from parallel.demo.checkpoint import WRITERS
from parallel.errors import ConfigError
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.quantise.selection import matches, select
from parallel.quantise.settings import DYNAMIC, SCHEMES, FP8Report, FP8Settings, choose_scheme
from parallel.worker.fp8_linear import E4M3, FP8Linear, become_fp8, quantised, to_fp8
from parallel.worker.resident import ResidentModel

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "torchao" / "linear.safetensors")
CPUS = resolve(SequenceParallelConfig(devices="cpu,cpu"))
WORKS = dict.fromkeys(DYNAMIC, "")
NO_ROWS = WORKS | {"dynamic_rowwise": "no such kernel"}
BF16 = torch.bfloat16
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
    counts = {"layers": 17, "already": 0, "skipped": 30, "unfit": 2}
    report = FP8Report(scheme="weight_only", reason="because", bytes_before=3 * 2**30, bytes_after=2**30, **counts)
    for part in ("weight_only (because)", "17 layers", "30 left", "2 left", "3,072.0 MiB before, 1,024.0 MiB after"):
        assert part in str(report)
    assert "already" not in str(report)
    assert report.to_json()["bytes_after"] == 2**30


# --- which layers -------------------------------------------------------------------------------------------------


def remote(folder: Path, family: str = "flux", storage: torch.dtype = torch.bfloat16, **options: Any) -> RemoteModel:
    """A tiny checkpoint in bf16, not loaded."""
    path = folder / "tiny.safetensors"
    WRITERS[family](path, **{"heads": 1, "depth": 1, "dtype": torch.bfloat16, **options})
    config = SequenceParallelConfig(devices="cpu")
    return RemoteModel(Recipe(path=str(path), weight_dtype=storage, compute_dtype=torch.bfloat16, config=config))


def resident(model: RemoteModel, scheme: str, skip: tuple[str, ...] = ()) -> ResidentModel:
    fp8 = {"scheme": scheme, "skip": list(skip)}
    return ResidentModel(model.recipe.to_json(), torch.device("cpu"), lambda done, total: None, fp8=fp8)


def in_fp8(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(getattr(module, "scale", None), Tensor)}


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic_rowwise", "dynamic_tensorwise"])
@pytest.mark.parametrize(
    "options", [{}, {"scaled": "comfy_quant"}, {"dtype": torch.float8_e4m3fn, "storage": torch.float8_e4m3fn}]
)
def test_the_host_knows_what_the_worker_does(tmp_path: Path, options: dict[str, Any], scheme: str):
    """Before and after are those of a model with and without FP8, and ComfyUI is told them before there is one."""
    model = remote(tmp_path, **options)
    plain = ResidentModel(model.recipe.to_json(), torch.device("cpu"), lambda done, total: None)
    loaded = resident(model, scheme)
    report = loaded.fp8_report
    assert report is not None
    assert loaded.nbytes + report["saved"] == pytest.approx(plain.nbytes, rel=0.005)  # but for biases stored in fp8
    if scheme == "weight_only":
        selection = model.select_fp8(FP8Settings(scheme=scheme))
        assert plain.nbytes - selection.saved == loaded.nbytes
        assert bool(selection.weights) is not bool(options)
        assert bool(selection.already) is bool(options)
    else:
        assert report["layers"] == len(in_fp8(loaded.model)) > 10


@pytest.mark.parametrize("pattern", ["img_mlp", "transformer_blocks.*.ff"])
def test_skipped_layers_stay_as_they_are(tmp_path: Path, pattern: str):
    """Named as in ComfyUI's files or as in diffusers."""
    model = remote(tmp_path)
    without = in_fp8(resident(model, "weight_only").model)
    loaded = resident(model, "weight_only", (pattern,))
    left = {"transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"}
    assert without - in_fp8(loaded.model) == left
    plain = ResidentModel(model.recipe.to_json(), torch.device("cpu"), lambda done, total: None)
    for name in left:
        assert torch.equal(loaded.model.get_parameter(f"{name}.weight"), plain.model.get_parameter(f"{name}.weight"))


@pytest.mark.parametrize("pattern", ["img_mpl", "blocks.77"])
def test_a_pattern_that_means_nothing_is_named(tmp_path: Path, pattern: str):
    with pytest.raises(ConfigError, match=rf"skip has the pattern '{pattern}', which fits no linear layer.*_blocks\.0"):
        remote(tmp_path).select_fp8(FP8Settings(skip=f"img_mlp, {pattern}"))


@pytest.mark.parametrize(("scheme", "unfit"), [("dynamic_rowwise", 2), ("dynamic_tensorwise", 2), ("weight_only", 0)])
def test_layers_of_odd_sizes_are_left_by_the_dynamic_schemes(tmp_path: Path, scheme: str, unfit: int):
    model = remote(tmp_path)
    adapter, source, dtypes = (
        model.inspected.adapter,
        model.inspected.source,
        dict.fromkeys(("storage", "compute"), BF16),
    )
    for name, shape in {"img_mlp.0": (504, 128), "img_mlp.2": (128, 504)}.items():
        model._tensors.shapes[f"double_blocks.0.{name}.weight"] = shape
    found = select(source, adapter, model._tensors, scheme=scheme, skip=(), **dtypes)
    assert found.unfit == unfit
    assert ("transformer_blocks.0.ff.net.2.weight" in found.weights) is not bool(unfit)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_dynamic_schemes_are_refused_without_a_gpu(tmp_path: Path, scheme: str):
    with pytest.raises(
        ConfigError, match=rf"scheme is '{scheme}', which does not work on cpu: CPUs do not compute in FP8"
    ):
        remote(tmp_path).select_fp8(FP8Settings(scheme=scheme))


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_old_gpus_are_refused_by_their_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda:0": (9, 0)}.get(device, capability))
    model = remote(tmp_path)
    model._layout = resolve(SequenceParallelConfig(devices="cuda:0,cuda:1"))
    if capability < (8, 9):
        with pytest.raises(ConfigError, match=r"cuda:1: compute capability 8\.6, FP8 products need 8\.9"):
            model.select_fp8(FP8Settings(scheme="dynamic_rowwise"))
    else:
        assert model.select_fp8(FP8Settings(scheme="dynamic_rowwise")).weights


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
