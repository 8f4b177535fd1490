"""Scaled fp8: scales are told from the network's tensors in every layout; other quantisations are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoints.source import open_source
from parallel.demo.checkpoint import SCALED_LAYOUTS, scaled_fp8
from parallel.errors import CheckpointError, UnsupportedError

FP8 = torch.float8_e4m3fn


def network() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layers = {f"blocks.{i}.linear.weight": torch.randn(8, 4, generator=generator) for i in range(6)}
    return layers | {"blocks.0.linear.bias": torch.ones(8), "img_in.weight": torch.ones(4, 2)}


def described(description: object) -> dict[str, Tensor]:
    """An fp8 layer with a scale and a `.comfy_quant` of this content."""
    content = json.dumps(description).encode() if not isinstance(description, bytes) else description
    return {
        "blocks.0.weight": torch.ones(4, 4).to(FP8),
        "blocks.0.weight_scale": torch.tensor(0.5),
        "blocks.0.comfy_quant": torch.tensor(list(content), dtype=torch.uint8),
    }


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_scales_are_told_from_the_network(tmp_path: Path, layout: str, prefix: str, dtype: torch.dtype):
    tensors, metadata = scaled_fp8(network(), layout, dtype)
    save_file({prefix + n: t for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata)
    source = open_source(str(tmp_path / "model.safetensors"))
    assert set(source.tensors) == set(network())
    with source.reader() as read:
        for name, true in network().items():
            stored, scale = read.stored(name)
            if name.endswith("linear.weight"):
                assert stored.dtype == dtype
                assert torch.equal(read(name), stored.float() * scale)
                assert (read(name) - true).abs().max() < true.abs().max() / 8
            else:
                assert scale is None and torch.equal(stored, true)


def test_a_plain_fp8_file_has_no_scales(tmp_path: Path):
    save_file({n: t.to(FP8) for n, t in network().items()}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path / "model.safetensors"))
    assert not source.scales
    assert all(info.dtype == FP8 for info in source.tensors.values())


INT8, UINT8 = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("what", "tensors"),
    [
        ("nvfp4", described({"format": "nvfp4"})),
        ("nvfp4", {"a.weight": UINT8, "a.weight_scale": torch.ones(4, 1), "a.weight_scale_2": torch.tensor(1.0)}),
        ("mxfp8", described({"format": "mxfp8"})),
        ("int8_tensorwise", described({"format": "int8_tensorwise"})),
        ("convrot_w4a4", described({"format": "convrot_w4a4"})),
        ("scaled int8", {"a.weight": INT8, "a.weight_scale": torch.tensor(1.0)}),
        (r"fp8 with scales of shape \[4, 1\]", {"a.weight": INT8.to(FP8), "a.weight_scale": torch.ones(4, 1)}),
        (r"SVDQuant \(Nunchaku\)", {"a.qweight": INT8, "a.wscales": torch.ones(1, 4)}),
        ("GPTQ or AWQ", {"a.qweight": INT8, "a.qzeros": torch.ones(1, 4)}),
        ("bitsandbytes nf4", {"a.weight": INT8, "a.weight.quant_state.bitsandbytes__nf4": UINT8}),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, what: str, tensors: dict[str, Tensor]):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"model\.safetensors is quantised as {what}.*use the bf16"):
        open_source(str(tmp_path / "model.safetensors"))


def test_block_scales_of_their_own_dtype_are_refused_by_name(tmp_path: Path):
    dtype = getattr(torch, "float8_e8m0fnu", torch.uint8)  # older PyTorch lacks it
    tensors = described({"format": "mxfp8"}) | {"blocks.0.weight_scale": torch.ones(4, 1).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="quantised as mxfp8"):
        open_source(str(tmp_path / "model.safetensors"))


def test_a_format_named_in_the_metadata_is_refused_by_name(tmp_path: Path):
    metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.0": {"format": "nvfp4"}}})}
    save_file(network(), tmp_path / "model.safetensors", metadata)
    with pytest.raises(UnsupportedError, match=r"quantised as nvfp4 \(at 'blocks.0'\)"):
        open_source(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.weight_scale": None}, "'blocks.0' is described as scaled fp8, but has no scale"),
        ({"blocks.0.weight": None}, "a scale for 'blocks.0.weight', but not that tensor"),
        ({"blocks.0.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "description of its quantisation is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str):
    tensors = described({"format": "float8_e4m3fn"}) | change
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("config", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gguf"}])
def test_a_quantised_folder_is_refused_by_name(tmp_path: Path, config: dict[str, object]):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SomeModel", "quantization_config": config}))
    save_file(network(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnsupportedError, match=f"quantised with {config['quant_method']}"):
        open_source(str(tmp_path))
