"""Streaming of offloaded blocks through a CUDA device: while one block runs, the next is copied from host memory.

The order of copies and blocks is tested with simulated streams (`tests/unit/test_passing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, cuda

from .packed import Packed

_SLOTS = 2
"""Number of block buffers on the device: one block runs while another is copied."""


class Passing:
    """Device buffers for weights that are kept in host memory.

    All copies run on a stream of their own. It first waits for the work queued on the compute stream when the copy is
    requested, and the compute stream waits for the copy before the block is launched.

    Args:
        units: the blocks in their usual order of execution; the last unit holds the weights outside the blocks, which
            stay on the device. Evicted weights become meta tensors rather than host tensors, which ComfyUI's layers
            would copy at each use.
        hosts: each unit's bytes in host memory, [n] uint8.
    """

    def __init__(self, units: Sequence[Packed], hosts: Sequence[Tensor], device: torch.device):
        (*self._blocks, self._rest), (*self._hosts, self._rest_host) = units, hosts
        self._device = device
        room = max(map(len, self._hosts), default=0)
        self._slots = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._stay = torch.empty(len(self._rest_host), dtype=torch.uint8, device=device)
        self._copies = cuda.Stream(device)
        self._arrived: dict[int, cuda.Event] = {}
        """Maps each block that has a slot to the event of its copy."""
        self._slot_of: dict[int, int] = {}
        self._used = 0
        """Slot of the running block."""
        self._current = False

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots) + self._stay.nbytes

    def forget(self) -> None:
        """Invalidates the copies on the device, because weights in host memory change."""
        self._current = False

    def begin(self) -> None:
        """Prepares a step. Called when all ranks have written their parts of the weights."""
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
        """Provides the weights of block `index`, which is about to be launched, and prefetches the following block.

        Args:
            following: block that will probably be launched next; by default the next in the list (after the last, the
                first).
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
        self._copies.wait_stream(cuda.current_stream(self._device))  # the slot's last use is queued there already
        with cuda.stream(self._copies):
            _copy(self._slots[slot][: len(host)], host)
            self._arrived[index] = self._copies.record_event()
        self._slot_of[index] = slot


def _copy(to: Tensor, host: Tensor) -> None:
    to.copy_(host, non_blocking=True)
