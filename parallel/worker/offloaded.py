"""A network's weights in host memory, in one copy for all workers.

The copy is an anonymous memory file that every worker maps. Each writes an equal part of every block, so the checkpoint
is read once, by all of them together. CPU workers compute with it where it is. A CUDA worker keeps what belongs to no
block on its device, and the blocks pass through (`passing`); for it the copy is page-locked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..attention.traffic import Traffic
from ..wire.plain import plain_tensors
from ..wire.shared import Segment
from .homes import Home, Order, Progress, Units, told
from .host_copy import HostCopy
from .packed import Packed, Weight
from .passing import Passing


class Offloaded(Home):
    """One copy for all ranks of the world. CPU ranks compute with it where it is; through a CUDA device blocks pass.

    Args:
        file: an empty memory file that all ranks have.
        rank, ranks: place among those that share the copy: each writes an equal part of it.
    """

    def __init__(
        self,
        rest: Sequence[Weight],
        blocks: Mapping[nn.Module, Sequence[Weight]],
        device: torch.device,
        progress: Progress,
        *,
        file: Segment,
        rank: int,
        ranks: int,
    ):
        self._rank, self._ranks = rank, ranks
        self._units = Units(rest, blocks, self._bring)
        self._order = Order(len(blocks))
        ends = list(accumulate(unit.size for unit in self._units.all))
        self._copy = HostCopy(file, max(1, ends[-1]))
        self._hosts = [self._copy.bytes(end - unit.size, end) for unit, end in zip(self._units.all, ends, strict=True)]
        self._passing: Passing | None = None
        for weight in told(self._units.weights, progress):
            self.put(weight.name, plain_tensors(weight.value))
            weight.clear()
        if device.type == "cuda":
            cargo = [_Cargo(unit, host) for unit, host in zip(self._units.all, self._hosts, strict=True)]
            self._passing = Passing(cargo[:-1], cargo[-1], device)
            self._copy.lock(device)
        else:
            for unit, host in zip(self._units.all, self._hosts, strict=True):
                unit.land(host)

    def put(self, name: str, pieces: Sequence[Tensor]) -> None:
        if self._passing is not None:
            self._passing.forget()
        number, weight = self._units.find(name)
        host = self._hosts[number]
        first, last = (len(host) * part // self._ranks for part in (self._rank, self._rank + 1))
        self._units.all[number].write(weight, pieces, host[first:last], first=first)

    @property
    def nbytes(self) -> int:
        return self._copy.size if self._passing is None else self._passing.nbytes

    @contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        if self._passing is not None:
            self._passing.begin()
        yield

    def close(self) -> None:
        self._units.close()
        self._copy.unlock()

    def _bring(self, number: int) -> None:
        if self._passing is not None and not self.skipping():
            self._passing.bring(number, self._order.after(number) or 0)


class _Cargo:
    """A unit that passes through a device."""

    def __init__(self, unit: Packed, host: Tensor):
        self._unit, self.host = unit, host

    def land(self, device: Tensor) -> None:
        self._unit.land(device)

    def leave(self) -> None:
        """To meta, not to host memory, from where ComfyUI's layers would fetch them at each use."""
        self._unit.leave()
