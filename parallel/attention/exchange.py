"""All-to-all exchanges: the interface that attention uses, and its implementation with `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PARTS = 3
"""Number of tensors packed into one exchange: q, k and v."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Coming(Generic[T]):
    """Pending result of an exchange, to be read before the next exchange."""

    wait: Callable[[], object]
    """Waits until the data has arrived."""
    read: Callable[[], T]
    """Returns the data; only after `wait`."""

    def __call__(self) -> T:
        self.wait()
        return self.read()


Joined = Coming[Tensor]
"""Pending tensor [PARTS, rows of all ranks, width]."""
Pieces = Coming[Sequence[Tensor]]
"""Pending flat pieces, one from each rank, in rank order."""


class Parcel(Protocol):
    """Send buffer of an exchange."""

    pieces: Sequence[Tensor]
    """Tensors to fill, [PARTS, rows, width] for each receiving rank."""

    def send(self) -> Joined:
        """Starts the exchange."""


class Exchange(Protocol):
    """All-to-all of pieces whose sizes every rank knows."""

    def pack(self, widths: Sequence[int], rows: Sequence[int], like: Tensor) -> Parcel:
        """Returns a send buffer for the parts of this rank's rows that each rank receives.

        Args:
            widths: elements per row for each receiving rank, which receives PARTS such rows for each row of this rank.
            rows: number of rows of each rank.
            like: tensor whose dtype and device the buffer has.
        """

    def start(self, whole: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pieces:
        """Starts sending the consecutive pieces of a contiguous tensor, one to each rank.

        Args:
            whole: the pieces, one after the other.
            sent: number of elements for each rank.
            received: number of elements from each rank.
        """


class CollectiveExchange:
    """Exchange by asynchronous `all_to_all_single`.

    Rows are the leading dimension, [rows, 3, width], so the senders' pieces arrive in order.

    A rank without heads receives nothing on the way in and sends nothing on the way back. NCCL has had faults with
    empty messages (https://github.com/NVIDIA/nccl/issues/696, fixed in 2.12.10), and a hang was reported where one of
    two ranks sends nothing (https://github.com/pytorch/pytorch/issues/146468, NCCL 2.21.5, unexplained). So such a rank
    sends one element to itself: every rank then sends and receives in every exchange. That changes no other rank's
    sizes and copies two or four bytes.

    Args:
        group: process group of the ranks.
        position: index of this rank in the group.
    """

    def __init__(self, group: dist.ProcessGroup, position: int):
        self._group = group
        self._position = position

    def pack(self, widths: Sequence[int], rows: Sequence[int], like: Tensor) -> Parcel:
        return _Packed(self, widths, rows, self._position, like)

    def start(self, whole: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pieces:
        flat = whole.reshape(-1)
        if sent[self._position] == 0:
            before = sum(sent[: self._position])
            flat = torch.cat((flat[:before], flat.new_zeros(1), flat[before:]))
        arrived, wait = self.transfer(flat, self.padded(sent), received)
        padded = self.padded(received)
        return Coming(wait, lambda: [p[:n] for p, n in zip(arrived.split(padded), received, strict=True)])

    def padded(self, sizes: Sequence[int]) -> list[int]:
        """Returns the pieces' sizes with at least one element from this rank to itself."""
        return [max(size, int(i == self._position)) for i, size in enumerate(sizes)]

    def transfer(
        self, send: Tensor, padded: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Callable[[], object]]:
        """Starts the transfer.

        Args:
            send: pieces of `padded` elements, one after the other.
            padded: number of elements for each rank, padded.
            received: number of elements from each rank, before padding.

        Returns:
            The receive buffer, flat and padded, and a function that waits until it is filled.
        """
        sizes = self.padded(received)
        arrived = send.new_empty(sum(sizes))
        work = dist.all_to_all_single(arrived, send, sizes, list(padded), group=self._group, async_op=True)

        def wait(_outlives_the_transfer: Tensor = send) -> None:
            work.wait()

        return arrived, wait


class _Packed:
    def __init__(
        self, exchange: CollectiveExchange, widths: Sequence[int], rows: Sequence[int], position: int, like: Tensor
    ):
        self._exchange = exchange
        sent = [PARTS * rows[position] * width for width in widths]
        self._padded = exchange.padded(sent)
        self._received = [PARTS * each * widths[position] for each in rows]
        self._shape = (sum(rows), PARTS, widths[position])
        self._whole = like.new_empty(sum(self._padded))
        self.pieces: Sequence[Tensor] = [
            piece[:size].view(rows[position], PARTS, width).transpose(0, 1)
            for piece, size, width in zip(self._whole.split(self._padded), sent, widths, strict=True)
        ]

    def send(self) -> Joined:
        arrived, wait = self._exchange.transfer(self._whole, self._padded, self._received)
        # Padded only if nothing else arrives.
        return Coming(wait, lambda: arrived[: sum(self._received)].view(self._shape).transpose(0, 1))
