"""Networks of ComfyUI's own classes, sharded and offloaded on two ranks: the bits of replicated ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import Installation
from tests.comfyui.quantised_networks import FORMATS
from tests.distributed.start_ranks import run_ranks

pytestmark = pytest.mark.comfyui

PLAIN = ("MiniMax H3; int8_convrot",)
"""Each block has int8 values, fp32 scales and fp32 norms; and this network makes a list of its blocks first."""
EVERY = (
    "MiniMax H3",
    "LTX-2.3, kept frame, batch 2", "LTXV", "Z-Image", "Wan, a timestep per frame", "Wan VACE", "FLUX, ControlNet",
    "Chroma, masked", "HunyuanVideo, padded", "Krea 2", "Qwen-Image, padded, clean reference", "Kandinsky 5",
    "Cosmos Predict 2", "Anima", "Krea 2; in bfloat16", "Krea 2; as float8_e4m3fn",
    *(f"Krea 2; {form}" for form in FORMATS),
)  # fmt: skip

Told = dict[str, dict[str, Any]]


def told_of(installation: Installation, folder: Path, names: tuple[str, ...], timeout: float = 240) -> list[Told]:
    """Of each rank: case → home → what came of it."""
    arguments = [str(installation.path), str(folder), *names]
    module, python = "tests.comfyui.network_home_ranks", str(installation.python)
    return [json.loads(text) for text in run_ranks(module, 2, folder, arguments, timeout, python)]


def assert_same_bits(told: Told, names: tuple[str, ...]) -> None:
    """Also with replaced weights, without them again, and after a call that was stopped."""
    assert set(told) == set(names)
    for name, homes in told.items():
        assert homes.keys() == {"replicate", "shard", "shard ahead", "offload"}
        for home, found in homes.items():
            assert found["changes"], f"{name}: the replaced weights do not show"
            assert found["equal"] == [True, True], f"{name}, {home}"
            assert found["replaced"] and found["restored"] and found["after a stop"], f"{name}, {home}: {found}"


def assert_in_parts(told: Told) -> None:
    """At most one block is whole, or two where the next one comes ahead; and none after a call, stopped or not."""
    for name, homes in told.items():
        whole, blocks = homes["replicate"]["nbytes"], homes["replicate"]["blocks"]
        assert len(homes["shard"]["counts"]) >= blocks, name
        assert max(homes["shard"]["counts"]) == min(1, blocks - 1), name
        assert max(homes["shard ahead"]["counts"]) == min(2, blocks - 1), name
        for home in ("shard", "shard ahead"):
            assert homes[home]["left"] == 0
            assert 0.5 * whole <= homes[home]["nbytes"] <= 0.51 * whole, name
        assert whole <= homes["offload"]["nbytes"] <= 1.01 * whole, name


@pytest.mark.slow
def test_every_home_gives_the_same_bits(installation: Installation, tmp_path: Path) -> None:
    for told in told_of(installation, tmp_path, PLAIN):
        assert_same_bits(told, PLAIN)
        assert_in_parts(told)


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_every_class_and_format_in_every_home(installation: Installation, tmp_path: Path) -> None:
    for told in told_of(installation, tmp_path, EVERY, timeout=1000):
        assert_same_bits(told, EVERY)
        assert_in_parts(told)
