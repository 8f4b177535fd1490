"""The groups that run now. A group is started at the first use of its layout and kept for the next one."""

from __future__ import annotations

import logging
import threading

from ..config import Layout, SequenceParallelConfig, resolve
from .group import Poll, WorkerGroup

log = logging.getLogger("sequence_parallel")

_lock = threading.Lock()
_groups: list[WorkerGroup] = []


def acquire(config: SequenceParallelConfig, poll: Poll | None = None) -> WorkerGroup:
    """The running group of this configuration, started if need be.

    A running group of another layout that uses one of the same devices is ended first: its weights would be in the way.

    Raises:
        ConfigError: the configuration does not fit this machine.
        WorkerDiedError: a worker could not start.
    """
    layout = resolve(config)
    with _lock:
        for group in list(_groups):
            if group.alive and group.layout.same_workers(layout):
                return group
            if not group.alive or _share_a_device(group.layout, layout):
                group.stop()
                _groups.remove(group)
        group = WorkerGroup(layout)
        log.info("starting %d workers on %s", layout.world_size, layout.describe())
        group.start(poll)
        _groups.append(group)
        return group


def running() -> list[WorkerGroup]:
    """The groups that are alive."""
    return [group for group in _groups if group.alive]


def stop_all() -> None:
    """Ends every group."""
    with _lock:
        while _groups:
            _groups.pop().stop()


def _share_a_device(a: Layout, b: Layout) -> bool:
    return not {d.name for d in a.devices}.isdisjoint(d.name for d in b.devices)
