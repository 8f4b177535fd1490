"""Fixtures shared by the tests that need a real ComfyUI."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from tests.comfyui.graphs import Setting
from tests.comfyui.installation import PACK_NAME, REPOSITORY, Installation, find_installation
from tests.comfyui.latents import sample
from tests.comfyui.model_files import write_model_files
from tests.comfyui.server import ComfyServer
from tests.distributed.faults import BOOT, Faults
from tests.distributed.faulty_boot import FILE

TEST_PACK = Path(__file__).parent / "test_pack"
PACKS = {PACK_NAME: REPOSITORY, "sp-test-pack": TEST_PACK}
_SHARED_SERVER = pytest.StashKey[ComfyServer]()
_MODELS = pytest.StashKey[Path]()

ServerFactory = Callable[..., ComfyServer]
Reference = Callable[[Setting], torch.Tensor]


@pytest.fixture(scope="session")
def installation() -> Installation:
    """ComfyUI and its Python, or a skip."""
    found, reason = find_installation()
    if found is None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def model_files(
    request: pytest.FixtureRequest, installation: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A models folder, written once for all servers of the session."""
    stash = request.config.stash
    if _MODELS not in stash:
        models = tmp_path_factory.mktemp("models")
        for name in ("diffusion_models", "checkpoints", "loras"):
            (models / name).mkdir()
        write_model_files(installation, models)
        stash[_MODELS] = models
    return stash[_MODELS]


@pytest.fixture(scope="session")
def start_server(
    installation: Installation, model_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> ServerFactory:
    """Makes servers, not started yet; arguments are ComfyUI's. Use them in a `with` statement.

    `wrapper` makes of the server's folder what goes before its command; see `ComfyServer`.
    """

    def make(
        *arguments: str,
        packs: Mapping[str, Path] = MappingProxyType({}),
        wrapper: Callable[[Path], Sequence[str]] = lambda base: (),
    ) -> ComfyServer:
        base = tmp_path_factory.mktemp("comfyui")
        for folder in model_files.iterdir():
            (base / "models").mkdir(exist_ok=True)
            (base / "models" / folder.name).symlink_to(folder, target_is_directory=True)
        arguments = ("--preview-method", "latent2rgb", *_front_end_arguments(), *arguments)
        return ComfyServer(installation, base, PACKS | packs, arguments, wrapper=wrapper(base))

    return make


def _front_end_arguments() -> tuple[str, ...]:
    """Another version of the front end than ComfyUI's own, if the environment names its folder."""
    folder = os.environ.get("COMFYUI_FRONT_END")
    if not folder:
        return ()
    if not (Path(folder) / "index.html").is_file():
        pytest.fail(f"COMFYUI_FRONT_END={folder}: this folder has no index.html", pytrace=False)
    return ("--front-end-root", folder)


@pytest.fixture
def native_server(request: pytest.FixtureRequest, start_server: ServerFactory) -> Iterator[ComfyServer]:
    """One server for the whole session, the browser tests included; a lost or stuck one is replaced.

    What it logs during a test is shown when the test fails.
    """
    stash = request.config.stash
    if _SHARED_SERVER not in stash or not stash[_SHARED_SERVER].alive:
        stash[_SHARED_SERVER] = start_server().__enter__()
        request.config.add_cleanup(stash[_SHARED_SERVER].close)
    shared = stash[_SHARED_SERVER]
    start = len(shared.log())
    yield shared
    request.node.add_report_section("teardown", "ComfyUI log", shared.log()[start:])
    if not shared.settle():
        shared.close()


@pytest.fixture
def server(native_server: ComfyServer) -> ComfyServer:
    """The shared server with this pack's nodes."""
    require_pack(native_server)
    return native_server


def require_pack(server: ComfyServer) -> None:
    if not server.has_node("SPLoadDiffusionModel"):
        lines = [line for line in server.log().splitlines() if "0.0 seconds" not in line]
        pytest.fail(f"{PACK_NAME} did not load in ComfyUI:\n" + "\n".join(lines[-60:]), pytrace=False)


@pytest.fixture(scope="module")
def native_latents() -> dict[Setting, torch.Tensor]:
    return {}


@pytest.fixture
def reference(server: ComfyServer, native_latents: dict[Setting, torch.Tensor]) -> Reference:
    """The native latent of a setting, sampled once."""

    def get(setting: Setting) -> torch.Tensor:
        if setting not in native_latents:
            native_latents[setting] = sample(server, setting)
        return native_latents[setting]

    return get


@pytest.fixture
def faults(server: ComfyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Workers of this server that fail when told to."""
    path = tmp_path / "fault.json"

    def boot(script: str) -> None:
        inputs = {"script": script, "environment": json.dumps({FILE: str(path)})}
        result = server.run({"1": {"class_type": "SPTestWorkersBoot", "inputs": inputs}})
        assert result.status == "success", result.message
        status, _ = server.post("/sequence_parallel/restart")
        assert status == 200

    boot(str(BOOT))
    faults = Faults(path, monkeypatch)
    yield faults
    faults.clear()
    boot("")
