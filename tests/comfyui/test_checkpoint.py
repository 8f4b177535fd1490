"""Load Checkpoint (SP) against Load Checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import GraphBuilder, Setting, Swapped, Text, sampling_graph, with_audio
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import LTX23_WHOLE, SDXL
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
"""Relative, after the steps of a sampling with CFG."""
ONE, TWO = Swapped("cpu"), Swapped("cpu,cpu")
CASES = {
    "sdxl": Setting(
        checkpoint=SDXL, whole=True, picture=True, empty_picture="EmptyLatentImage", cfg=4.0, batch=2,
        positive=Text(tokens=9), negative=Text(seed=12, tokens=9),
    ),
    "ltx_2.3": Setting(
        checkpoint=LTX23_WHOLE, whole=True, empty="EmptyLTXVLatentVideo", audio=True, width=160, height=96, length=17,
        cfg=4.0, arrange=with_audio, positive=Text(width=192, valid=6), negative=Text(seed=12, tokens=5, width=192),
    ),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_samples_as_load_checkpoints(
    server: ComfyServer, reference: Reference, name: str, swapped: Swapped
) -> None:
    latent = sample(server, CASES[name], swapped)
    assert relative_difference(latent, reference(CASES[name])) <= TOLERANCE


def test_what_lies_beside_the_network_decides_how_it_is_sampled(server: ComfyServer, reference: Reference) -> None:
    """The file says that the network predicts v; Load Diffusion Model takes that for noise."""
    setting = CASES["sdxl"]
    path = server.models / "checkpoints" / SDXL
    (server.models / "diffusion_models" / SDXL).unlink(missing_ok=True)
    (server.models / "diffusion_models" / SDXL).symlink_to(path)
    as_noise = reference(replace(setting, whole=False))
    assert relative_difference(reference(setting), as_noise) > 0.1
    assert relative_difference(sample(server, replace(setting, whole=False), TWO), as_noise) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_vae_is_load_checkpoints(server: ComfyServer, name: str) -> None:
    encoded = [encode(server, CASES[name].checkpoint, swapped) for swapped in (None, TWO)]
    assert torch.equal(*encoded)


def encode(server: ComfyServer, checkpoint: str, swapped: Swapped | None) -> torch.Tensor:
    """A grey picture, by the VAE of a checkpoint."""
    builder = GraphBuilder()
    loader, _ = builder.add_whole_loader(checkpoint, swapped)
    picture = builder.add("EmptyImage", width=64, height=64, batch_size=1, color=0x808080)
    latent = builder.add("VAEEncode", pixels=picture, vae=[loader, 2])
    builder.add("SaveLatent", node_id="latent", samples=latent, filename_prefix="latents/test")
    return read_latent(server, server.run(builder.graph))


def test_a_degree_that_needs_a_plan_is_refused_for_a_unet(server: ComfyServer) -> None:
    workers = set(server.workers())
    result = server.run(sampling_graph(CASES["sdxl"], replace(TWO, ulysses_degree=2)))
    assert result.status == "error"
    assert "ulysses_degree is 2, but UNetModel has no split plan" in result.message
    assert not set(server.workers()) - workers
