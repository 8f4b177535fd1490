"""Running worker groups. A group is started at the first use of its layout and kept for later use."""

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
    """Returns the running group of this configuration; starts it if necessary.

    A running group of another layout that uses one of the same devices is ended first: its weights occupy memory there.

    Args:
        config: devices and degrees.
        poll: see `WorkerGroup.call`.
        first: recipe of the model that will be loaded first, see `WorkerGroup`.

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
    """Starts a group; the caller must hold the lock."""
    group = WorkerGroup(layout, first=first)
    workers = f"{layout.world_size} worker{'' if layout.world_size == 1 else 's'}"
    log.info("starting %s on %s", workers, layout.describe())
    _groups.append(group)  # so that its status is visible while it starts
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
    """Returns the groups that are alive."""
    return [group for group in _groups if group.alive]


def stop_all() -> None:
    """Ends every group."""
    with _lock:
        while _groups:
            _groups.pop().stop()


def restart() -> int:
    """Ends every group, even in the middle of a step, and starts workers on the same devices, without weights.

    Returns:
        Number of groups started; 0 if there was none.

    Raises:
        WorkerDiedError: a worker could not start.
    """
    groups = list(_groups)
    for group in groups:  # without the lock: a prompt that waits for workers to start holds it
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
    """Returns `WorkerGroup.status` of every group, including failed ones until they are replaced."""
    return [group.status() for group in list(_groups)]


def keep_alive(seconds: Callable[[], float]) -> None:
    """Ends idle workers automatically from now on.

    Args:
        seconds: returns the idle time in seconds after which workers are ended; 0 keeps them for ever. Called every few
            seconds while there are groups.
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
    """Ends the groups unused for `seconds`; none while a sampling runs, because they idle between its steps."""
    sampling = status.sampling()
    if seconds <= 0 or (sampling is not None and sampling.running) or not _lock.acquire(blocking=False):
        return  # the lock is held while a group starts, and that group is in use
    try:
        for group in list(_groups):
            idle = time.monotonic() - group.last_used
            if group.alive and not group.busy and idle >= seconds:
                group.stop("the workers had exited because they were idle (setting Keep-alive); queue the prompt again")
                _groups.remove(group)
                workers = group.layout.describe()
                status.tell(
                    status.LEFT, f"the workers on {workers} have exited after {idle / 60:.0f} minutes without work"
                )
    finally:
        _lock.release()


def _share_a_device(a: Layout, b: Layout) -> bool:
    return not {d.name for d in a.devices}.isdisjoint(d.name for d in b.devices)
