"""FP8 on a CUDA device: which products it has, how exact they are, and how fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import recipe
from parallel.diffusers.tiny import tiny_request, write_tiny
from parallel.host import running
from parallel.host.remote_model import RemoteModel
from parallel.quantise.settings import CAPABILITY, DYNAMIC, FP8Settings
from parallel.worker.fp8_linear import fp8_layer, support

CUDA = torch.cuda.is_available()
CAPABLE = CUDA and torch.version.hip is None and torch.cuda.get_device_capability() >= CAPABILITY
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
capable = pytest.mark.skipif(not CAPABLE, reason="no CUDA device of compute capability 8.9")

TOKENS = 4096 + 512
"""Of a FLUX picture of 1024 × 1024, with its text."""
WIDTH = 3072
SINGLE_BLOCK = [(WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 5 * WIDTH)]
"""Linear layers [N, K] of a single-stream block: q, k, v, MLP in, out."""


def pair(shape: tuple[int, int], scheme: str, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    """The same layer as it is and in FP8."""
    plain = nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    return plain, fp8_layer(plain, scheme)


@capable
def test_this_device_has_both_products():
    assert support(torch.device("cuda")) == dict.fromkeys(DYNAMIC, "")


@capable
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [*DYNAMIC, "weight_only"])
def test_a_layer_in_fp8_is_near_the_layer(scheme: str, dtype: torch.dtype):
    plain, in_fp8 = pair((384, 256), scheme, dtype)
    x = torch.randn(2, 137, 256, device="cuda", dtype=dtype)
    x[0, 3] = 0
    expected = plain(x).float()
    assert (in_fp8(x).float() - expected).norm() <= 0.05 * expected.norm()


def milliseconds(layers: list[nn.Linear], inputs: list[Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@capable
@torch.no_grad()
def test_rowwise_products_are_1_3_times_as_fast_on_flux_size_linears():
    """Rounding the activations included; medians of interleaved rounds."""
    pairs = [pair(shape, "dynamic_rowwise", torch.bfloat16) for shape in SINGLE_BLOCK]
    inputs = [torch.randn(1, TOKENS, k, device="cuda", dtype=torch.bfloat16) for _, k in SINGLE_BLOCK]
    plain, in_fp8 = ([layers[i] for layers in pairs] for i in range(2))
    rounds = [(milliseconds(plain, inputs), milliseconds(in_fp8, inputs)) for _ in range(60)][10:]
    before, after = (torch.tensor(times).median().item() for times in zip(*rounds, strict=True))
    print(f"{torch.cuda.get_device_name()}: bf16 {before:.3f} ms, FP8 {after:.3f} ms: {before / after:.2f} times")
    for (n, k), (layer, other), x in zip(SINGLE_BLOCK, pairs, inputs, strict=True):
        each = [(milliseconds([layer], [x]), milliseconds([other], [x])) for _ in range(30)][5:]
        one, two = (torch.tensor(times).median().item() for times in zip(*each, strict=True))
        print(f"  {k} → {n}: {one:.3f} ms, {two:.3f} ms: {one / two:.2f} times")
    assert before / after >= 1.3


@pytest.mark.parametrize("scheme", ["weight_only", pytest.param("auto", marks=capable)])
def test_a_cuda_worker_in_fp8_is_near_one_without(tmp_path: Path, scheme: str):
    path, network = tmp_path / "tiny", "FluxTransformer2DModel"
    write_tiny(path, network, dtype=torch.bfloat16)
    request = tiny_request(network, frames=1, height=32, width=32, dtype=torch.bfloat16)
    model = RemoteModel(recipe(str(path), SequenceParallelConfig(devices="cuda:0")))
    try:
        model.weights.ensure_loaded()
        (plain,) = model.steps([request])
        model.weights.ensure_loaded(fp8=FP8Settings(scheme=scheme))
        (found,) = model.steps([request])
    finally:
        running.stop_all()
    print(model.weights.fp8_report)
    assert model.weights.fp8_report is not None
    assert model.weights.fp8_report.scheme == ("weight_only" if scheme == "weight_only" else "dynamic_rowwise")
    assert F.mse_loss(found, plain).sqrt() <= 0.08 * plain.square().mean().sqrt()
    assert not torch.equal(found, plain)
