"""Environments with what popular packs install: diffusers' classes step in them, and ComfyUI starts with the pack.

`make crowded` prepares them; CROWDED_PYTHON names others, as paths of interpreters with colons between.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.plans.diffusers import PLANS
from tests.comfyui.fixtures import PACKS, installation, model_files, require_pack  # noqa: F401
from tests.comfyui.graphs import Setting, Swapped
from tests.comfyui.installation import Installation, _missing_modules
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.server import ComfyServer

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "tests" / "crowded-requirements.txt").read_text().splitlines()
_VERSIONS = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""

pytestmark = [pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(900)]


def interpreters() -> list[str]:
    if named := os.environ.get("CROWDED_PYTHON"):
        return named.split(os.pathsep)
    prepared = [ROOT / f".venv-crowded-{major}" / "bin" / "python" for major in (4, 5)]
    return [str(path) for path in prepared if path.exists()]


def versions_in(python: str) -> dict[str, str | None]:
    names = [line for line in PACKAGES if line and not line.startswith("#")]
    arguments = [python, "-c", _VERSIONS, "transformers", *names]
    return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module", params=interpreters() or [None])
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter whose environment has all the packages."""
    if request.param is None:
        pytest.skip("no crowded environment (make crowded, or set CROWDED_PYTHON)")
    missing = [name for name, version in versions_in(request.param).items() if version is None]
    assert not missing, f"{request.param} is not crowded: {', '.join(missing)} missing"
    return request.param


def test_every_network_loads_and_steps_as_its_own_class_does(python: str) -> None:
    command = [python, "-m", "tests.crowded.every_network"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"network"')]
    assert {result["network"]: result["error"] for result in results} == dict.fromkeys(PLANS), done.stderr[-4000:]


@pytest.fixture(scope="module")
def server(
    python: str,
    installation: Installation,  # noqa: F811
    model_files: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ComfyServer]:
    """ComfyUI in the crowded environment."""
    if missing := _missing_modules(Path(python)):
        pytest.skip(f"{python} cannot run ComfyUI: {missing}")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models").mkdir()
    for folder in model_files.iterdir():
        (base / "models" / folder.name).symlink_to(folder, target_is_directory=True)
    with ComfyServer(replace(installation, python=Path(python)), base, PACKS) as server:
        yield server


@pytest.mark.comfyui
def test_comfyui_starts_with_the_pack_and_samples(server: ComfyServer) -> None:
    require_pack(server)
    assert not re.search("IMPORT FAILED", server.log())
    expected = sample(server, Setting())
    actual = sample(server, Setting(), Swapped(devices="cpu,cpu"))
    assert relative_difference(actual, expected) <= 1e-4
