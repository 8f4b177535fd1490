"""A worker's connection to the host: shared memory segments, the control page, progress events."""

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
        """The page by which the host stops an operation and sees that this rank is alive."""
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
        """Returns the tensor at a place in shared memory."""
        return self._segments[place.segment].tensor(place)

    def take(self, name: str) -> Segment:
        """Removes a segment and returns it; the caller owns it from then on."""
        return self._segments.pop(name)

    def drop(self, name: str) -> None:
        """Closes the segment of this name, if there is one."""
        if segment := self._segments.pop(name, None):
            segment.close()

    def beat(self) -> None:
        """Sends a heartbeat to the host."""
        self.control.beat(self._rank)

    def stop_if_cancelled(self, what: str) -> None:
        """Stops if the host has requested it. Only for operations that this rank can stop without the others.

        Raises:
            StepCancelled: the host has requested a stop; `what` names the operation in the message.
        """
        if self.control.cancel_requested:
            raise StepCancelled(f"stopped {what}")

    def tell_progress(self, done: int, total: int) -> None:
        """Sends progress to the host, which shows it to the user."""
        self._channel.send({"event": "progress", "done": done, "total": total})

    def loading(self) -> Callable[[int, int], None]:
        """Returns a callback (bytes loaded, bytes in total) that reports progress and stops loading on Cancel."""
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            self.beat()
            self.stop_if_cancelled("while loading")
            if time.monotonic() - told > _PROGRESS_INTERVAL_S or done == total:
                told = time.monotonic()
                self.tell_progress(done, total)

        return progress
