"""Worker groups that the tests of a session share: starting a worker takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.config import SequenceParallelConfig, resolve
from parallel.host.group import WorkerGroup
from tests.distributed.tiny_models import StartGroup, TinyModels


@pytest.fixture(scope="session")
def start_group() -> Iterator[StartGroup]:
    """The running group of a device list, one thread per worker."""
    groups: dict[str, WorkerGroup] = {}

    def start(devices: str) -> WorkerGroup:
        if devices not in groups or not groups[devices].alive:
            groups[devices] = WorkerGroup(resolve(SequenceParallelConfig(devices=devices)), threads=1)
            groups[devices].start()
        return groups[devices]

    yield start
    for group in groups.values():
        group.stop()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny checkpoints, each written once."""
    return TinyModels(Path(tmp_path_factory.mktemp("models")))
