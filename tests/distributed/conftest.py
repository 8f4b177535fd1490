"""Worker groups that the tests of a session share: starting a worker takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.config import SequenceParallelConfig, resolve
from parallel.host import running
from parallel.host.group import WorkerGroup
from tests.distributed.devices import chosen, on_ranks
from tests.distributed.faults import Faults
from tests.distributed.tiny_models import StartGroup, TinyModels


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent and _starts_many(item):
            item.add_marker(pytest.mark.slow)
    if chosen() != "cpu":
        for item in items:
            if (marker := item.get_closest_marker("cpu_ranks")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"CPU ranks only: {marker.args[0]}"))


def _starts_many(item: pytest.Function) -> bool:
    """Whether it is the only reason to start a group of four workers or more."""
    devices = item.callspec.params.get("devices") if hasattr(item, "callspec") else None
    return isinstance(devices, str) and devices.count(",") >= 3


@pytest.fixture(scope="session")
def start_group() -> Iterator[StartGroup]:
    """The running group of a device list, one thread per worker."""
    groups: dict[str, WorkerGroup] = {}

    def start(devices: str) -> WorkerGroup:
        devices = on_ranks(devices)
        if devices not in groups or not groups[devices].alive:
            groups[devices] = WorkerGroup(resolve(SequenceParallelConfig(devices=devices)), threads=1)
            groups[devices].start()
        return groups[devices]

    yield start
    for group in groups.values():
        group.stop()


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Workers of these tests fail when told to; their temporary files have a folder of their own."""
    running.stop_all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        yield Faults(tmp_path_factory.mktemp("faults") / "fault.json", patch)
    running.stop_all()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny checkpoints, each written once."""
    return TinyModels(Path(tmp_path_factory.mktemp("models")))
