"""Nothing listens beyond loopback, in no phase of the workers' life; `tests/comfyui` looks at tiles, too."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.config import SequenceParallelConfig, resolve
from parallel.host.group import WorkerGroup
from tests.distributed.devices import on_ranks
from tests.distributed.process_facts import open_tcp_sockets
from tests.distributed.test_sampling import SETTINGS, Sampling
from tests.distributed.tiny_models import TinyModels, loaded, step


class Sockets:
    """Local addresses of the TCP sockets of this process and its children, looked at all the time.

    Attributes:
        elsewhere: phase → sockets of another address than loopback.
        listening: phase → how many listened at once, at most.
        looks: phase → how often they were looked at.
    """

    def __init__(self) -> None:
        self.elsewhere: dict[str, set[str]] = {}
        self.listening: dict[str, int] = {}
        self.looks: dict[str, int] = {}

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        done = threading.Event()
        looking = threading.Thread(target=self._look_until, args=(done, phase))
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()

    def _look_until(self, done: threading.Event, phase: str) -> None:
        while True:
            last = done.is_set()
            self._look(phase)
            if last:
                return
            done.wait(0.02)

    def _look(self, phase: str) -> None:
        found = []
        for pid in (os.getpid(), *_children()):
            with contextlib.suppress(OSError):  # it has ended
                found += open_tcp_sockets(pid)
        self.looks[phase] = self.looks.get(phase, 0) + 1
        self.listening[phase] = max(self.listening.get(phase, 0), sum(listens for _, listens in found))
        self.elsewhere.setdefault(phase, set()).update(str(where) for where, _ in found if not where.is_loopback)


def _children() -> set[int]:
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for line in lists for pid in line.split()}


@pytest.mark.slow
def test_nothing_listens_beyond_loopback_in_any_phase(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment would have the ranks meet on the network."""
    network = sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo")
    if network:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", network[0])
    sockets, devices = Sockets(), on_ranks("cpu,cpu")
    before = _children()
    group = WorkerGroup(resolve(SequenceParallelConfig(devices=devices)), threads=1)
    try:
        with sockets.during("start and meeting"):
            group.start()
        assert len(_children() - before) >= 2, "the workers are not among those that are looked at"
        setting = SETTINGS["euler"]
        with contextlib.ExitStack() as stack:
            with sockets.during("load"):
                remote = stack.enter_context(loaded(group, setting.model.path(tiny_models)))
            with sockets.during("step"):
                step(remote, setting.model.inputs)
            with sockets.during("sampling"):
                remote.sample(Sampling(setting).record())
        with sockets.during("end"):
            group.stop()
    finally:
        group.stop()
    assert all(count >= 1 for count in sockets.looks.values()) and len(sockets.looks) == 5
    assert sockets.listening["sampling"] >= 2, "the ranks listen for each other; if not, look at another protocol"
    assert not any(sockets.elsewhere.values()), sockets.elsewhere


def test_a_socket_on_the_network_would_be_seen() -> None:
    sockets = Sockets()
    with socket.socket() as everywhere:
        everywhere.bind(("", 0))
        everywhere.listen()
        with sockets.during("now"):
            pass
    assert sockets.elsewhere == {"now": {"0.0.0.0"}}
