"""Quantised files of networks of ComfyUI's own classes: its own bits on one worker, and how near two are."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.server import AT_START

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("quantised_networks.py")
SCHEMES_SCRIPT = Path(__file__).with_name("scheme_networks.py")
ALLOWED = 1e-5
ROUND_ACTIVATIONS = ("int8_convrot", "nvfp4, computed")
KNOBS: dict[str, dict[str, Any]] = {
    "one": {"devices": "cpu"},
    "two": {"devices": "cpu,cpu"},
    "ring": {"devices": "cpu,cpu", "ring_degree": 2},
    "shard": {"devices": "cpu,cpu", "weights": "shard"},
    "offload": {"devices": "cpu,cpu", "weights": "offload"},
}
SEVERAL = [title for title in KNOBS if title != "one"]
Told = dict[str, dict[str, Any]]


def run_script(installation: Installation, script: Path, folder: Path, *arguments: str, **more: str) -> Told:
    """What a script prints in its last line, run by ComfyUI's Python with more of an environment."""
    drop = {"PYTHONHOME", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    ended = subprocess.run(
        [installation.python, script, installation.path, REPOSITORY, folder, *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(AT_START)} | more,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    told: Told = json.loads(ended.stdout.splitlines()[-1])
    return told


NETWORKS = ("h3", "qwen", "z-image")
ALL_FORMATS = pytest.param((None, NETWORKS), marks=pytest.mark.extended, id="all formats")


@pytest.fixture(scope="module", params=[pytest.param((["int8_convrot"], ("h3",)), id="int8"), ALL_FORMATS])
def results(
    request: pytest.FixtureRequest, installation: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Told:
    """Of formats as ComfyUI computes with them on a CPU, and of nvfp4 as on a GPU that computes in it."""

    def run(folder: Path, *arguments: str, **more: str) -> Told:
        return run_script(installation, SCRIPT, folder, *arguments, **more)

    formats, networks = request.param
    found = run(tmp_path_factory.mktemp("quantised"), json.dumps(KNOBS), json.dumps(formats), *networks)
    few = {title: KNOBS[title] for title in ("one", "two", "ring")}
    nvfp4 = run(
        tmp_path_factory.mktemp("nvfp4"),
        json.dumps(few),
        json.dumps(["nvfp4"]),
        *networks,
        SEQUENCE_PARALLEL_TEST_COMPUTES_IN_NVFP4="1",
    )
    assert (len(found), len(nvfp4)) == (len(formats or ()) or 20, len(networks))
    return found | {f"{name}, computed": told for name, told in nvfp4.items()}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("state", ("plain", "lora", "removed"))
def test_one_worker_has_comfyuis_bits(results: Told, state: str) -> None:
    """With a LoRA, quantised layers are patched and quantised again by ComfyUI's own code."""
    for name, told in results.items():
        assert told["rounding"] > 1e-3, f"{name}: nothing is rounded"
        assert told["lora changes"] > 1e-3, name
        assert told["one"][state] == 0, f"{name}: {told['one']}"


@pytest.mark.parametrize("state", ("plain", "lora", "removed"))
def test_several_workers_are_as_near_as_the_format_allows(results: Told, state: str) -> None:
    """Formats that round activations take a large step where a value lies next to the border of two: there an input
    that moves by 3e-7 moves the result by as much as the split does."""
    for name, told in results.items():
        rounds = next((form for form in ROUND_ACTIVATIONS if name.endswith(form)), "")
        allowed = ALLOWED
        if rounds:
            allowed = 4 * max(other["sensitivity"] for title, other in results.items() if title.endswith(rounds))
        for title in SEVERAL:
            if title in told:
                assert told[title][state] <= allowed, f"{name}, {title}: {told[title]}, allowed {allowed}"


def test_a_scale_over_all_tokens_is_the_same_on_all_workers(results: Told) -> None:
    """nvfp4 without an input_scale takes it from the largest value of all tokens. By that of a worker's own tokens
    every value would be rounded otherwise; so, only some that lie next to a border are."""
    differences = [
        told[title][state]
        for name, told in results.items()
        if name.endswith("computed")
        for title in ("two", "ring")
        for state in ("plain", "lora")
    ]
    assert len(differences) in (4, 12)
    assert sum(difference <= ALLOWED for difference in differences) >= len(differences) / 2, differences


def test_files_that_are_quantised_are_not_quantised_again(results: Told) -> None:
    for name, told in results.items():
        if name in ("krea2 bfloat16", "krea2 as fp8_e4m3fn"):
            assert told["fp8"] == (24 if "fp8" in name else 0), name
        else:
            assert re.search(r"FP8 Quantize .* quantised already \((int8|float8|nvfp4|mxfp8)", str(told["fp8"])), name


SCHEME_NETWORKS = ("MiniMax H3", "Z-Image")


@pytest.fixture(scope="module")
def schemes(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Of comfy-kitchen's schemes in FP8 Quantize (SP)."""
    knobs = {title: KNOBS[title] for title in ("one", "two", "shard", "offload")}
    folder = tmp_path_factory.mktemp("schemes")
    found = run_script(installation, SCHEMES_SCRIPT, folder, json.dumps(knobs), *SCHEME_NETWORKS)
    assert len(found) == 3 * len(SCHEME_NETWORKS)
    return found


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_a_scheme_gives_comfyuis_bits_for_a_file_that_is_quantised_so(schemes: Told) -> None:
    """Also of weights that a LoRA has changed; and the memory is as said. In nvfp4's files single numbers move what
    follows to other places in memory, on which the bits of products depend."""
    for name, told in schemes.items():
        assert told["rounding"] > 1e-3 and told["lora changes"] > 1e-3, f"{name}: {told}"
        assert max(told["one"].values()) <= (ALLOWED if "nvfp4" in name else 0), f"{name}: {told}"
        assert told["restored"] == (0 if "int8" in name else told["layers"]), f"{name}: {told}"
        assert told["saved"] == 0, f"{name}: {told}"


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_a_scheme_is_as_near_on_several_workers_as_it_allows(schemes: Told) -> None:
    for name, told in schemes.items():
        for title in ("two", "shard", "offload"):
            for state, difference in told[title].items():
                assert difference <= (told["sensitivity"] if "int8" in name else ALLOWED), f"{name}, {title}, {state}"
