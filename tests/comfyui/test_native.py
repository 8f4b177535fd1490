"""The harness itself: native graphs run, and the settings that parity tests compare are not all alike."""

import re

import pytest

from tests.comfyui.graphs import Setting, Text, sampling_graph
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import DEEP, FLUX_KINDS, HUNYUAN_VIDEO_KINDS, NO_GUIDANCE, ORIGINAL_NAMES, TINY
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

BASE = Setting()


def test_native_sampling_is_repeatable(native_server: ComfyServer) -> None:
    first = sample(native_server, BASE)
    native_server.free()  # else ComfyUI answers from its cache
    sample(native_server, Setting(seed=99))
    assert relative_difference(sample(native_server, BASE), first) < 1e-6
    assert list(first.shape) == [1, 16, 2, 6, 8]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Setting(seed=8), id="seed"),
        pytest.param(Setting(positive=Text(seed=13)), id="prompt"),
        pytest.param(Setting(positive=Text(guidance=1.0)), id="guidance"),
        pytest.param(Setting(positive=Text(valid=5)), id="mask"),
    ],
)
def test_inputs_reach_the_model(native_server: ComfyServer, other: Setting) -> None:
    assert relative_difference(sample(native_server, other), sample(native_server, BASE)) > 1e-3


@pytest.mark.parametrize("checkpoint", [TINY, DEEP, ORIGINAL_NAMES, NO_GUIDANCE, *HUNYUAN_VIDEO_KINDS, *FLUX_KINDS])
def test_checkpoints_are_whole(native_server: ComfyServer, checkpoint: str) -> None:
    """Else ComfyUI samples with weights that it never set, and says so in the log only."""
    sample(native_server, Setting(checkpoint=checkpoint, steps=1, picture=checkpoint in FLUX_KINDS))
    assert not re.search("unet (missing|unexpected)", native_server.log())


def test_validation_errors_are_reported(native_server: ComfyServer) -> None:
    result = native_server.run(sampling_graph(Setting(checkpoint="absent.safetensors")))
    assert result.status == "rejected"
    assert "absent.safetensors" in result.message
