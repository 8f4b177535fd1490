"""What the host shares with a worker, and how the worker tells it of its progress: memory, the control page, events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import StepCancelled
from ..wire.channel import Channel
from ..wire.control import SIZE as CONTROL_SIZE
from ..wire.control import ControlPage
from ..wire.shared import Segment, TensorRef

_PROGRESS_INTERVAL_S = 0.1


class HostLink:
    def __init__(self, channel: Channel, rank: int):
        self._channel, self._rank = channel, rank
        self._segments: dict[str, Segment] = {}
        self._control: ControlPage | None = None

    @property
    def control(self) -> ControlPage:
        """By which the host stops an operation, and sees that this rank is alive."""
        assert self._control is not None, "the host attaches it first"
        return self._control

    def attach(self, announced: list[dict[str, Any]], fds: list[int]) -> None:
        """Maps segments that the host shares for the first time, or in a new size."""
        for entry, fd in zip(announced, fds, strict=True):
            segment = Segment(entry["name"], fd, entry["size"])
            if segment.name == "control":
                assert segment.size == CONTROL_SIZE
                self._control = ControlPage(segment)
                continue
            self.drop(segment.name)
            self._segments[segment.name] = segment

    def tensor(self, place: TensorRef) -> Tensor:
        """What lies at a place in shared memory."""
        return self._segments[place.segment].tensor(place)

    def take(self, name: str) -> Segment:
        """A segment, which belongs to the caller from here on."""
        return self._segments.pop(name)

    def drop(self, name: str) -> None:
        """Closes a segment, if there is one of this name."""
        if segment := self._segments.pop(name, None):
            segment.close()

    def beat(self) -> None:
        """A sign of life."""
        self.control.beat(self._rank)

    def stop_if_cancelled(self, what: str) -> None:
        """Where this rank can stop by itself.

        Raises:
            StepCancelled: the host asked to stop; `what` says where that was.
        """
        if self.control.cancel_requested:
            raise StepCancelled(f"stopped {what}")

    def tell_progress(self, done: int, total: int) -> None:
        """Shown to the user."""
        self._channel.send({"event": "progress", "done": done, "total": total})

    def loading(self) -> Callable[[int, int], None]:
        """What is told how far loading has come, in bytes; it stops it on Cancel."""
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            self.beat()
            self.stop_if_cancelled("while loading")
            if time.monotonic() - told > _PROGRESS_INTERVAL_S or done == total:
                told = time.monotonic()
                self.tell_progress(done, total)

        return progress
