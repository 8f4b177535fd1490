"""The tensors of any checkpoint layout, as a single file would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.adapters.native import NativeTensors
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, open_source
from parallel.demo.checkpoint import WRITERS, write_tiny_hunyuan_video
from parallel.worker.resident import ResidentModel

TINY: dict[str, Any] = {"heads": 1, "depth": 1, "context_dim": 32}


def native_tensors(path: Path) -> tuple[Source, NativeTensors]:
    source = open_source(str(path))
    adapter = adapter_for(source)
    return source, NativeTensors(source, adapter, adapter.model_config(source))


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    source, tensors = native_tensors(path)
    assert tensors.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    with source.reader() as read:
        for name, tensor in expected.items():
            assert torch.equal(tensors.read(name, read).tensor, tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WRITERS)
def test_a_diffusers_folder_reads_as_the_single_file_it_came_from(tmp_path: Path, family: str, dtype: torch.dtype):
    WRITERS[family](tmp_path / "single.safetensors", dtype=dtype, **TINY)
    name = str(dtype).removeprefix("torch.")
    recipe = {"path": str(tmp_path / "single.safetensors"), "weight_dtype": name, "compute_dtype": name}
    model: Any = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model
    model.save_pretrained(tmp_path / "folder", max_shard_size="2MB")
    assert native_tensors(tmp_path / "folder")[0].is_diffusers
    assert_reads(tmp_path / "folder", load_file(tmp_path / "single.safetensors"))


def test_a_single_file_keeps_its_own_names(tmp_path: Path):
    path = tmp_path / "original.safetensors"
    write_tiny_hunyuan_video(path, names="original", prefix="model.diffusion_model.", **TINY)
    stored = load_file(path)
    assert_reads(path, {name.removeprefix("model.diffusion_model."): tensor for name, tensor in stored.items()})
