"""Reading back and comparing what SaveLatent wrote."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.comfyui.graphs import OUTPUT, Setting, Swapped, sampling_graph
from tests.comfyui.server import ComfyServer, PromptResult


def sample(server: ComfyServer, setting: Setting, swapped: Swapped | None = None, timeout: float = 120) -> torch.Tensor:
    """Run a setting to the end and return its latent."""
    return read_latent(server, server.run(sampling_graph(setting, swapped), timeout))


def read_latent(server: ComfyServer, result: PromptResult, output: str = OUTPUT) -> torch.Tensor:
    assert result.status == "success", f"{result.status}: {result.message}\n{server.log_tail(30)}"
    saved = result.outputs[output]["latents"][0]
    return load_file(server.output / saved["subfolder"] / saved["filename"])["latent_tensor"].float()


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a-b| / max|b|."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.isfinite().all() and expected.isfinite().all(), "a latent is not finite"
    return ((actual - expected).abs().max() / expected.abs().max()).item()
