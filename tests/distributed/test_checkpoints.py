"""Folders in the kinds that users have: each gives what diffusers makes of it, and takes its own memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel.diffusers.folder import transformer_class
from parallel.errors import CheckpointError, ConfigError
from tests.distributed.devices import chosen, kind
from tests.distributed.tiny_models import (
    FLUX,
    HUNYUAN,
    WAN,
    Inputs,
    StartGroup,
    TinyModels,
    loaded,
    recipe_of,
    relative_difference,
    step,
    stock,
)

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
HALF = [
    pytest.param(HUNYUAN, bf16, bf16),
    pytest.param(HUNYUAN, fp32, fp16, marks=pytest.mark.extended),
    pytest.param(FLUX, fp16, fp16),
    pytest.param(FLUX, fp32, fp16, marks=pytest.mark.extended),  # in bf16 it rounds the time, too
    pytest.param(WAN, fp32, bf16),
    pytest.param(WAN, bf16, bf16, marks=pytest.mark.extended),
]
"""A class, the dtype of its file, and that in which the workers are to keep it."""


@pytest.mark.slow
@pytest.mark.parametrize(("network", "stored", "kept"), HALF)
def test_weights_of_16_bits(
    start_group: StartGroup, tiny_models: TinyModels, network: str, stored: torch.dtype, kept: torch.dtype
):
    """What diffusers keeps in fp32 stays so: of Wan some modules.

    Many workers are as near to the exact result as one is: below fp32, another number of rows is rounded otherwise.
    """
    path = tiny_models.path(network, dtype=stored)
    inputs = Inputs(network, height=10, width=6, dtype=kept)
    with loaded(start_group("cpu"), path, fp32) as remote:
        exact = step(remote, Inputs(network, height=10, width=6))
        whole = remote.weights.nbytes
    with loaded(start_group("cpu"), path, kept) as remote:
        one = step(remote, inputs)
        least, most = (recipe_of(path, "cpu", dtype).nbytes for dtype in (kept, fp32))
        assert least < 0.6 * most
        assert whole - remote.weights.nbytes == most - least
    with loaded(start_group("cpu,cpu"), path, kept, ring_degree=2) as remote:
        two = step(remote, inputs)
    expected = stock(path, inputs.make()).float()
    if chosen() == "cpu":
        assert torch.equal(one, expected)
    rounding = relative_difference(expected, exact)
    assert 1e-4 < rounding < 0.1
    assert max(relative_difference(actual, exact) for actual in (one, two)) <= 2 * rounding


@pytest.mark.slow
@pytest.mark.parametrize("network", [HUNYUAN, FLUX])
def test_a_folder_of_several_files(start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, network: str):
    """As `save_pretrained` writes it, with their index: the same as the single file."""
    single, inputs = tiny_models.path(network), Inputs(network)
    transformer_class(network).from_pretrained(single).save_pretrained(tmp_path, max_shard_size="4MB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    with loaded(start_group("cpu"), single) as remote:
        expected = step(remote, inputs)
    with loaded(start_group("cpu,cpu"), tmp_path) as remote:
        assert relative_difference(step(remote, inputs), expected) <= kind().split
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path} is damaged or incomplete: .*{files[1]}"):
        recipe_of(tmp_path, "cpu,cpu")


def test_a_dtype_that_diffusers_cannot_compute_in_is_refused_before_any_worker_is_started(tiny_models: TinyModels):
    with pytest.raises(ConfigError, match=r"weight_dtype is float8_e4m3fn, .* allowed are float32, bfloat16, float16"):
        recipe_of(tiny_models.path(), "cpu", torch.float8_e4m3fn)
