"""What one CUDA device can show: its kernels, and a worker on it against a worker on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from parallel.attention.kernels import select
from parallel.attention.merge import merge
from parallel.attention.traffic import Traffic
from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import recipe
from parallel.diffusers.tiny import TINY, tiny_request, write_tiny
from parallel.host import running
from parallel.host.remote_model import RemoteModel
from parallel.sampling.recording import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NETWORK = "HunyuanVideoTransformer3DModel"


@pytest.mark.parametrize("name", ["auto", "sdpa", "cudnn", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_and_its_parts_merged_agree_with_fp32(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 257, 128, device="cuda") for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    kernel = select(name, torch.device("cuda:0"))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    allowed = 3 * (F.scaled_dot_product_attention(q, k, v).float() - exact).abs().max() + 1e-3
    assert (kernel(q, k, v).float() - exact).abs().max() <= allowed
    out, lse = kernel.with_lse(q, k[:, :, :100], v[:, :, :100])
    merged, _ = merge(out.float(), lse, *kernel.with_lse(q, k[:, :, 100:], v[:, :, 100:]))
    assert (merged - exact).abs().max() <= allowed


def loaded_on(device: str, path: Path) -> RemoteModel:
    model = RemoteModel(recipe(str(path), SequenceParallelConfig(devices=device)))
    model.weights.ensure_loaded()
    return model


@pytest.mark.parametrize("network", TINY)
def test_a_cuda_worker_agrees_with_a_cpu_worker(tmp_path: Path, network: str):
    write_tiny(tmp_path / "tiny", network)
    request = tiny_request(network, text=8, valid=(5,))
    results = [loaded_on(device, tmp_path / "tiny").steps([request])[0] for device in ("cpu", "cuda:0")]
    running.stop_all()
    assert ((results[1] - results[0]).abs().max() / results[0].abs().max()) <= 1e-3  # TF32 is off by default


@pytest.mark.parametrize(("computing", "expected"), [(0, 1.0), (2, 0.0)])
def test_only_what_the_stream_waits_for_is_exposed(computing: int, expected: float):
    """A second stream works for a while, as an exchange does; the first one computes so many times as long, and then
    waits."""
    cycles = 100_000_000
    for _ in range(2):  # the first time warms up
        traffic, measured = Traffic(on_cuda=True), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            measured[0].record()
            torch.cuda._sleep(cycles)
            measured[1].record()
        torch.cuda._sleep(computing * cycles)
        with traffic.waiting():
            torch.cuda.current_stream().wait_event(measured[1])
        assert traffic.exposed_s == 0, "read before the device was awaited"
        torch.cuda.synchronize()
        traffic.read_events()
        while_s = measured[0].elapsed_time(measured[1]) / 1000
    assert traffic.exposed_s == pytest.approx(expected * while_s, abs=0.1 * while_s)


def sampled_on(device: str, path: Path) -> torch.Tensor:
    """Three steps with fresh noise and a mask, recorded and run on this device."""
    generator = torch.Generator().manual_seed(0)
    noise, extra, image = (torch.randn(1, 16, 2, 8, 8, generator=generator).to(device) for _ in range(3))
    mask = (image > 0).float()
    asked = tiny_request(NETWORK)
    asked = replace(asked, conditioning={name: tensor.to(device) for name, tensor in asked.conditioning.items()})
    recorder = Recorder(noise.shape, noise.device, most_bytes=2**20)
    x, sigmas = recorder.given(noise), torch.tensor([1.0, 0.6, 0.3, 0.0], device=device)
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        x = x * mask + image * (1 - mask)
        timestep = torch.full((1,), 1000.0, device=device) * sigma
        request = replace(asked, x=x, timestep=timestep)
        velocity = recorder.network(request, x.shape, conditions=frozenset({0}), sigma=float(sigma)).float()
        recorder.report(step, x - velocity * sigma, x, 3)
        x = x + velocity * (following - sigma) + 0.1 * following * extra
    shown: list[torch.Tensor] = []
    model = loaded_on(device, path)
    result, _ = model.sample(recorder.finish(x), on_step=lambda step, denoised, x, steps: shown.append(denoised))
    running.stop_all()
    assert result.device.type == shown[-1].device.type == torch.device(device).type
    return result.cpu()


def test_a_sampling_on_a_cuda_worker_agrees_with_a_cpu_worker(tmp_path: Path):
    write_tiny(tmp_path / "tiny", NETWORK)
    expected = sampled_on("cpu", tmp_path / "tiny")
    assert (
        sampled_on("cuda:0", tmp_path / "tiny") - expected
    ).abs().max() / expected.abs().max() <= 1e-3  # TF32 is off by default
