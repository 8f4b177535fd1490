"""What users are told of workers, as tests hear it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.host import status


@contextmanager
def heard(*kinds: str) -> Iterator[list[status.Event]]:
    """The events of these kinds from here on."""
    events: list[status.Event] = []

    def listen(event: status.Event) -> None:
        if event.kind in kinds:
            events.append(event)

    status.listen(listen)
    try:
        yield events
    finally:
        status._listeners.remove(listen)
