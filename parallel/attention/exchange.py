"""All-to-all exchanges: what attention asks of one, and the one through `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

PARTS = 3
"""q, k and v travel together."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Coming(Generic[T]):
    """What other ranks send, to be read before the next exchange."""

    wait: Callable[[], object]
    """Until it is there."""
    read: Callable[[], T]
    """After that."""

    def __call__(self) -> T:
        self.wait()
        return self.read()


Joined = Coming[Tensor]
"""[PARTS, rows of all ranks, width]."""
Pieces = Coming[Sequence[Tensor]]
"""What each rank sent, flat, by rank."""


class Parcel(Protocol):
    """Room for what is to be sent."""

    pieces: Sequence[Tensor]
    """For each rank [PARTS, rows, width], to be filled."""

    def send(self) -> Joined:
        """Starts the exchange."""


class Exchange(Protocol):
    """All-to-all of pieces whose sizes every rank knows."""

    def pack(self, widths: Sequence[int], rows: Sequence[int], like: Tensor) -> Parcel:
        """Room for what each rank is to get of this rank's rows.

        Args:
            widths: elements of a row for each rank; each gets PARTS such rows for every one of this rank's.
            rows: that each rank has.
            like: has the dtype and device.
        """

    def start(self, whole: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pieces:
        """Sends the pieces of a contiguous tensor, one after the other and of `sent` elements each.

        Args:
            received: elements that each rank sends to this one.
        """


class CollectiveExchange:
    """By `all_to_all_single`, asynchronously. Rows lead, so the pieces of the senders land in order: [rows, 3, width].

    Args:
        group: the ranks.
        position: of this rank among them.
    """

    def __init__(self, group: dist.ProcessGroup, position: int):
        self._group = group
        self._position = position

    def pack(self, widths: Sequence[int], rows: Sequence[int], like: Tensor) -> Parcel:
        return _Packed(self, widths, rows, self._position, like)

    def start(self, whole: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pieces:
        arrived, wait = self.transfer(whole.reshape(-1), sent, received)
        return Coming(wait, lambda: arrived.split(list(received)))

    def transfer(
        self, send: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Callable[[], object]]:
        """What will have arrived, flat, once the second has been called."""
        arrived = send.new_empty(sum(received))
        work = dist.all_to_all_single(arrived, send, list(received), list(sent), group=self._group, async_op=True)

        def wait(_outlives_the_transfer: Tensor = send) -> None:
            work.wait()

        return arrived, wait


class _Packed:
    def __init__(
        self, exchange: CollectiveExchange, widths: Sequence[int], rows: Sequence[int], position: int, like: Tensor
    ):
        self._exchange = exchange
        self._sent = [PARTS * rows[position] * width for width in widths]
        self._received = [PARTS * each * widths[position] for each in rows]
        self._shape = (sum(rows), PARTS, widths[position])
        self._whole = like.new_empty(sum(self._sent))
        self.pieces: Sequence[Tensor] = [
            piece.view(rows[position], PARTS, width).transpose(0, 1)
            for piece, width in zip(self._whole.split(self._sent), widths, strict=True)
        ]

    def send(self) -> Joined:
        arrived, wait = self._exchange.transfer(self._whole, self._sent, self._received)
        return Coming(wait, lambda: arrived.view(self._shape).transpose(0, 1))
