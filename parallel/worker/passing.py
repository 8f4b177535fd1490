"""Blocks that pass through a CUDA device: while one runs, the next one arrives from host memory.

The order of copies and blocks is tested with streams that are simulated (`tests/unit/test_passing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, cuda

from .packed import Packed

_SLOTS = 2
"""Blocks that have room on the device: one runs, one arrives."""


class Passing:
    """The device's side of weights in host memory.

    All copies are made on one stream of their own. It waits for what the compute stream has been given before the copy
    was asked for, and the compute stream waits for the copy before it is given the block.

    Args:
        units: the blocks, in the order in which they usually run, and what is needed at any time of a step, and stays.
            What leaves goes to meta, not to host memory, from where ComfyUI's layers would fetch it at each use.
        hosts: of each, its bytes in host memory, [n] uint8.
    """

    def __init__(self, units: Sequence[Packed], hosts: Sequence[Tensor], device: torch.device):
        (*self._blocks, self._rest), (*self._hosts, self._rest_host) = units, hosts
        self._device = device
        room = max(map(len, self._hosts), default=0)
        self._slots = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._stay = torch.empty(len(self._rest_host), dtype=torch.uint8, device=device)
        self._copies = cuda.Stream(device)
        self._arrived: dict[int, cuda.Event] = {}
        """Block → event, of those that have a slot."""
        self._slot_of: dict[int, int] = {}
        self._used = 0
        """The slot of the block that runs."""
        self._current = False

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots) + self._stay.nbytes

    def forget(self) -> None:
        """The weights in host memory change: what is on the device is not to be used again."""
        self._current = False

    def begin(self) -> None:
        """Before a step, when all ranks have written what they had to write."""
        if self._current:
            return
        for block in self._slot_of:
            self._blocks[block].leave()
        self._slot_of.clear()
        self._arrived.clear()
        _copy(self._stay, self._rest_host)
        self._rest.land(self._stay)
        self._current = True

    def bring(self, index: int, following: int | None = None) -> None:
        """Block `index` is about to be launched, behind those before it.

        Args:
            following: that will probably be launched next; by default the one behind it in the list.
        """
        if index not in self._slot_of:
            self._fetch(index, 1 - self._used)
        self._used = self._slot_of[index]
        cuda.current_stream(self._device).wait_event(self._arrived[index])
        self._blocks[index].land(self._slots[self._used])
        following = (index + 1) % len(self._blocks) if following is None else following
        if following not in self._slot_of:
            self._fetch(following, 1 - self._used)

    def _fetch(self, index: int, slot: int) -> None:
        for replaced in [other for other, place in self._slot_of.items() if place == slot]:
            self._blocks[replaced].leave()
            del self._slot_of[replaced], self._arrived[replaced]
        host = self._hosts[index]
        self._copies.wait_stream(cuda.current_stream(self._device))  # whatever used the slot is behind us there
        with cuda.stream(self._copies):
            _copy(self._slots[slot][: len(host)], host)
            self._arrived[index] = self._copies.record_event()
        self._slot_of[index] = slot


def _copy(to: Tensor, host: Tensor) -> None:
    to.copy_(host, non_blocking=True)
