"""ComfyUI told to keep the network in bf16 (its arithmetic then stays in fp32 on a CPU)."""

from collections.abc import Iterator

import pytest
import torch

from tests.comfyui.fixtures import ServerFactory, require_pack
from tests.comfyui.graphs import Setting, Swapped, Text
from tests.comfyui.latents import sample
from tests.comfyui.model_files import FLUX, WAN
from tests.comfyui.server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SETTINGS = {
    "hunyuan_video": Setting(positive=Text(valid=5)),
    "hunyuan_video_cfg_dpmpp_2m": Setting(cfg=4.0, sampler="dpmpp_2m", scheduler="sgm_uniform"),
    "flux": Setting(checkpoint=FLUX, picture=True),
    "wan": Setting(checkpoint=WAN, positive=Text(width=4096), negative=Text(seed=12, width=4096)),
}
ALLOWED = 0.02
"""Relative difference in the L2 norm."""


@pytest.fixture(scope="module")
def bf16_server(start_server: ServerFactory) -> Iterator[ComfyServer]:
    with start_server("--bf16-unet") as server:
        require_pack(server)
        yield server


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("devices", [pytest.param("cpu", marks=pytest.mark.extended), "cpu,cpu"])
@pytest.mark.parametrize("name", SETTINGS)
def test_nearly_the_same_latent_in_bf16(bf16_server: ComfyServer, server: ComfyServer, name: str, devices: str) -> None:
    expected = sample(bf16_server, SETTINGS[name])
    actual = sample(bf16_server, SETTINGS[name], Swapped(devices=devices))
    rounded_away = difference(expected, sample(server, SETTINGS[name]))
    print(f"{name} on {devices}: {difference(actual, expected):.1e}; bf16 itself: {rounded_away:.1e}")
    assert difference(actual, expected) <= ALLOWED
    assert rounded_away > 1e-3, "this server does not use bf16"
