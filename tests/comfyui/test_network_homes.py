"""Networks of ComfyUI's own classes, sharded and offloaded on two ranks: the bits of replicated ones."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.quantised_networks import FORMATS
from tests.distributed.start_ranks import run_ranks

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

PLAIN = ("MiniMax H3; int8_convrot",)
"""Each block has int8 values, fp32 scales and fp32 norms; and this network makes a list of its blocks first."""
EVERY = (
    "MiniMax H3", "LTX-2.3, kept frame, batch 2", "Wan, a timestep per frame", "Wan VACE", "FLUX, ControlNet",
    "HunyuanVideo, padded", "Krea 2", "Krea 2; in bfloat16", "Krea 2; as float8_e4m3fn",
    *(f"Krea 2; {form}" for form in FORMATS), "Krea 2; FP8 weight_only", "MiniMax H3; FP8 weight_only",
)  # fmt: skip
"""Those that ComfyUI recognises by a tiny file."""

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
        assert max(homes["shard"]["counts"]) == 1, name
        assert max(homes["shard ahead"]["counts"]) == 2, name
        for home in ("shard", "shard ahead"):
            assert homes[home]["left"] == 0
            assert 0.5 * whole <= homes[home]["nbytes"] <= 0.51 * whole, name
        assert whole <= homes["offload"]["nbytes"] <= 1.01 * whole, name


def test_every_home_gives_the_same_bits(installation: Installation, tmp_path: Path) -> None:
    for told in told_of(installation, tmp_path, PLAIN):
        assert_same_bits(told, PLAIN)
        assert_in_parts(told)


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_every_class_and_format_in_every_home(installation: Installation, tmp_path: Path) -> None:
    """FP8 Quantize (SP), too, on which replaced weights are quantised as the file's are."""
    for told in told_of(installation, tmp_path, EVERY, timeout=1000):
        assert_same_bits(told, EVERY)
        assert_in_parts(told)
        for name in (name for name in EVERY if "FP8" in name):
            found = told[name]["replicate"]
            assert found["rounding"] > 1e-3 and found["only weights are rounded"], name
            assert found["fp8"]["layers"] >= 4 * found["blocks"] and found["fp8"]["skipped"] > 0
            saved = found["nbytes without"] - found["nbytes"]
            assert saved == found["fp8"]["saved"] > 0.3 * found["nbytes without"], name
            assert all(home["fp8"] == found["fp8"] for home in told[name].values())


@pytest.fixture(scope="module")
def in_workers(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of two workers, see `network_memory`."""
    command = [installation.python, "-m", "tests.comfyui.network_memory", installation.path]
    folder = tmp_path_factory.mktemp("memory")
    run = subprocess.run([*command, folder], cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.extended
def test_replicated_weights_stay_in_the_mapped_file(in_workers: dict[str, Any]) -> None:
    whole, told = in_workers["whole"], in_workers["replicate"]
    assert 0.99 * whole <= told["nbytes"] <= whole
    assert max(*told["loading"], *told["rest"]) <= 0.1 * whole
    assert told["copies"] == 0


@pytest.mark.extended
def test_a_sharded_worker_never_holds_more_than_its_part(in_workers: dict[str, Any]) -> None:
    whole, told = in_workers["whole"], in_workers["shard"]
    assert told["nbytes"] <= 0.51 * whole
    assert max(*told["loading"], *told["rest"]) <= 0.6 * whole
    assert min(told["rest"]) >= 0.45 * whole, "the weights have not been seen"


@pytest.mark.extended
def test_offloaded_weights_are_in_memory_once(in_workers: dict[str, Any]) -> None:
    whole, told = in_workers["whole"], in_workers["offload"]
    assert 0.99 * whole <= told["copies"] <= 1.01 * whole
    assert sum(told["loading"]) <= 0.2 * whole and sum(told["rest"]) <= 0.1 * whole
    assert told["left"] == 0


@pytest.mark.extended
def test_auto_decides_by_free_memory_and_says_why(in_workers: dict[str, Any]) -> None:
    """A mapped file costs nothing; what is cast costs each worker a copy."""
    told = in_workers["auto"]
    assert re.fullmatch(r"replicate: auto: all workers use [\d.]+ GiB where the file is mapped", told["mapped"])
    assert re.fullmatch(r"offload: auto: 2 × [\d.]+ GiB do not fit in [\d.]+ GiB of memory, .*", told["cast"])
    assert "needs 1.05e+06 GiB of host memory for its copy" in told["too large"]
