"""The groups that run now. A group is started at the first use of its layout and kept for the next one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..config import Layout, SequenceParallelConfig, resolve
from . import status
from .calls import Poll, held
from .group import WorkerGroup

log = logging.getLogger("sequence_parallel")

_IDLE_CHECK_S = 5.0

_lock = threading.Lock()
_groups: list[WorkerGroup] = []
_watcher: threading.Thread | None = None
_keep_alive: Callable[[], float] | None = None


def acquire(
    config: SequenceParallelConfig, poll: Poll | None = None, *, first: Mapping[str, Any] | None = None
) -> WorkerGroup:
    """The running group of this configuration, started if need be.

    A running group of another layout that uses one of the same devices is ended first: its weights would be in the way.

    Args:
        config: devices and degrees.
        poll: see `WorkerGroup.call`.
        first: recipe of the model that is to be loaded, see `WorkerGroup`.

    Raises:
        ConfigError: the configuration does not fit this machine.
        WorkerDiedError: a worker could not start.
    """
    layout = resolve(config)
    with held(_lock, poll):
        for group in list(_groups):
            if group.alive and group.layout.same_workers(layout):
                group.last_used = time.monotonic()
                return group
            if not group.alive or _share_a_device(group.layout, layout):
                group.stop()
                _groups.remove(group)
        return _start(layout, poll, first)


def _start(layout: Layout, poll: Poll | None = None, first: Mapping[str, Any] | None = None) -> WorkerGroup:
    """Starts a group; the caller holds the lock."""
    group = WorkerGroup(layout, first=first)
    workers = f"{layout.world_size} worker{'' if layout.world_size == 1 else 's'}"
    log.info("starting %s on %s", workers, layout.describe())
    _groups.append(group)  # shown while it starts, too
    began = time.monotonic()
    try:
        group.start(poll)
    except BaseException:
        if group.status()["failure"] is None:  # e.g. cancelled: there is nothing to show
            _groups.remove(group)
        raise
    status.tell(status.STARTED, f"{workers} on {layout.describe()} in {time.monotonic() - began:.1f} s")
    return group


def running() -> list[WorkerGroup]:
    """The groups that are alive."""
    return [group for group in _groups if group.alive]


def stop_all() -> None:
    """Ends every group."""
    with _lock:
        while _groups:
            _groups.pop().stop()


def restart() -> int:
    """Ends every group, also in the middle of a step, and starts workers on the same devices, without weights.

    Returns:
        How many groups have been started: 0 where none was known.

    Raises:
        WorkerDiedError: a worker could not start.
    """
    groups = list(_groups)
    for group in groups:  # without the lock, which a prompt holds that waits for workers to start
        group.stop("the workers were restarted while this prompt ran; queue it again")
    before = [(group.layout, group.first) for group in groups]
    with _lock:
        for group in _groups:
            group.stop()
        _groups.clear()
        for layout, first in before:
            _start(layout, first=first)
        return len(before)


def snapshot() -> list[dict[str, Any]]:
    """`WorkerGroup.status` of every group, those that have failed included until others take their place."""
    return [group.status() for group in list(_groups)]


def keep_alive(seconds: Callable[[], float]) -> None:
    """From now on idle workers leave after so many seconds; 0 keeps them for ever.

    Args:
        seconds: asked every few seconds while there are workers.
    """
    global _keep_alive, _watcher
    _keep_alive = seconds
    if _watcher is None:
        _watcher = threading.Thread(target=_watch_idle, name="sequence-parallel idle", daemon=True)
        _watcher.start()


def _watch_idle() -> None:
    while True:
        time.sleep(_IDLE_CHECK_S)
        if _groups and _keep_alive is not None:
            end_idle(_keep_alive())


def end_idle(seconds: float) -> None:
    """Ends the groups that nothing has used for so long; while a sampling runs, none: they wait between its steps."""
    sampling = status.sampling()
    if seconds <= 0 or (sampling is not None and sampling.running) or not _lock.acquire(blocking=False):
        return  # a group that starts is in use, and holds the lock
    try:
        for group in list(_groups):
            idle = time.monotonic() - group.last_used
            if group.alive and not group.busy and idle >= seconds:
                group.stop("the workers had left after their time without work")
                _groups.remove(group)
                workers = group.layout.describe()
                status.tell(
                    status.LEFT, f"the workers on {workers} have left after {idle / 60:.0f} minutes without work"
                )
    finally:
        _lock.release()


def _share_a_device(a: Layout, b: Layout) -> bool:
    return not {d.name for d in a.devices}.isdisjoint(d.name for d in b.devices)
