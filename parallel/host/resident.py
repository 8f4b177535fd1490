"""Weights in the workers, as the host holds them: where they are, how they are given up."""

from __future__ import annotations

import logging

from ..errors import WorkerError
from ..wire.messages import Operation
from .calls import Poll
from .group import WorkerGroup

log = logging.getLogger("sequence_parallel")


class Resident:
    """What the workers of a group hold under a name. It may go at any time: by eviction, a crash, another layout.

    Args:
        name: in the workers.
        goodbye: by which they free it.

    Attributes:
        nbytes: bytes of weights that one worker has on its device; 0 when not loaded.
        group: the workers that it was last loaded in, until it is unloaded.
    """

    def __init__(self, name: str, goodbye: Operation):
        self.name = name
        self.nbytes = 0
        self.group: WorkerGroup | None = None
        self._goodbye = goodbye

    @property
    def loaded(self) -> bool:
        """Whether the workers hold the weights."""
        return self.group is not None and self.group.alive

    def settled(self, poll: Poll | None) -> WorkerGroup:
        """The workers, once a call that was cancelled has really ended there: shared memory may be written.

        Raises:
            WorkerError: they have failed.
        """
        assert self.group is not None, "call ensure_loaded first"
        self.group.settle(poll)
        return self.group

    def post(self, message: Operation) -> None:
        """Asks the workers for an operation without waiting, if they hold the weights."""
        if self.group is not None and self.loaded:
            self.group.post(message)

    def unload(self) -> None:
        """Frees the weights in the workers; the processes stay."""
        if (group := self._left()) is not None:
            try:
                group.call(self._goodbye)
            except WorkerError as error:  # the weights have gone with the workers
                log.warning("%s", str(error))

    def release(self) -> None:
        """As `unload`, without waiting: for a finalizer, which may run in the middle of anything."""
        if (group := self._left()) is not None:
            group.post(self._goodbye)

    def _arrived(self, group: WorkerGroup, title: str, nbytes: int) -> None:
        """Notes that the weights have been loaded; `title` is for people."""
        self.group, self.nbytes = group, nbytes
        group.figures.holds(self.name, title, nbytes)

    def _left(self) -> WorkerGroup | None:
        """Notes that the weights are given up; returns the workers if they hold them."""
        group = self.group if self.loaded else None
        self.group, self.nbytes = None, 0
        if group is not None:
            group.figures.dropped(self.name)
        return group
