"""Host side of weights that reside in the workers: tracks where they are, and frees them."""

from __future__ import annotations

import logging

from ..errors import WorkerError
from ..wire.messages import Operation
from .calls import Poll
from .group import WorkerGroup

log = logging.getLogger("sequence_parallel")


class Resident:
    """Weights that a group's workers hold under a name. They may be lost at any time: eviction, crash, another layout.

    Args:
        name: name in the workers.
        goodbye: operation that frees the weights there.

    Attributes:
        nbytes: bytes of weights that one worker has on its device; 0 when not loaded.
        group: group in which the weights were last loaded; None once they are unloaded.
    """

    def __init__(self, name: str, goodbye: Operation):
        self.name = name
        self.nbytes = 0
        self.group: WorkerGroup | None = None
        self._goodbye = goodbye

    @property
    def loaded(self) -> bool:
        """True if the workers hold the weights."""
        return self.group is not None and self.group.alive

    def settled(self, poll: Poll | None) -> WorkerGroup:
        """Returns the group once a cancelled call has ended in its workers, so that shared memory may be written.

        Raises:
            WorkerError: the workers have failed.
        """
        assert self.group is not None, "call ensure_loaded first"
        self.group.settle(poll)
        return self.group

    def post(self, message: Operation) -> None:
        """Sends the workers an operation without waiting for it, if they hold the weights."""
        if self.group is not None and self.loaded:
            self.group.post(message)

    def unload(self) -> None:
        """Frees the weights in the workers; the processes keep running."""
        if (group := self._left()) is not None:
            try:
                group.call(self._goodbye)
            except WorkerError as error:  # the weights are lost with the workers
                log.warning("%s", str(error))

    def release(self) -> None:
        """Frees the weights without waiting: for a finalizer, which may interrupt any code."""
        if (group := self._left()) is not None:
            group.post(self._goodbye)

    def _arrived(self, group: WorkerGroup, title: str, nbytes: int) -> None:
        """Records that the weights have been loaded; `title` is their display name."""
        self.group, self.nbytes = group, nbytes
        group.figures.holds(self.name, title, nbytes)

    def _left(self) -> WorkerGroup | None:
        """Records that the weights are given up; returns the group if its workers still hold them, else None."""
        group = self.group if self.loaded else None
        self.group, self.nbytes = None, 0
        if group is not None:
            group.figures.dropped(self.name)
        return group
