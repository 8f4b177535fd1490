"""Weights that the ranks of a sequence share out among them (PyTorch's FSDP2).

FSDP2 gathers a module's parameters when the module is called. Our block functions call a block's parts instead, so they
are gathered and put away by name, when the block is taken from its list: `unshard` and `reshard` are FSDP2's public way
to do that. The ranks that share weights are those that share a sequence: they run the same blocks in the same order
whatever a cache skips, and wherever Cancel stops them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from ..attention.traffic import Traffic
from .homes import Home, share_of_rows, watch_blocks


class Sharded(Home):
    """Equal parts of every parameter, cut by rows.

    Args:
        group: the ranks that share a sequence.
        ahead: gather the next block while one runs. By default on CUDA: a CPU has nothing to do it with.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, group: dist.ProcessGroup, ahead: bool | None = None):
        self._model, self._device = model, device
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._rank, self._ranks = group.rank(), group.size()
        mesh = DeviceMesh.from_group(group, device.type)
        blocks = watch_blocks(model, self)
        self._units = [_shard(unit, mesh) for unit in (*blocks, model)]
        self._rest = self._units.pop()
        """What belongs to no block. It is whole while a step runs: its parts come before the blocks and after them."""
        _materialise(model, device)
        self._whole: dict[int, UnshardHandle | None] = {}
        """Blocks whose weights this rank has, or will have when the handle, if any, has been waited for."""
        self._traffic = Traffic()

    def share(self, name: str) -> tuple[Tensor, slice]:
        parameter = self._model.get_parameter(name)
        return _local(parameter), share_of_rows(len(parameter), self._rank, self._ranks)

    @property
    def nbytes(self) -> int:
        return sum(_local(parameter).nbytes for parameter in self._model.parameters())

    @contextmanager
    def in_use(self, traffic: Traffic | None = None) -> Iterator[None]:
        self._traffic = traffic or Traffic()
        with self._traffic.waiting():
            self._rest.unshard()
        try:
            yield
        finally:
            self._put_away(but=set())
            self._rest.reshard()
            if self._device.type == "cpu":  # else the allocator keeps what was gathered for the next time
                ctypes.CDLL(None).malloc_trim(0)

    def bring(self, index: int) -> None:
        ahead = index + 1 if self._ahead and index + 1 < len(self._units) else index
        self._put_away(but={index, ahead})
        if index not in self._whole:
            with self._traffic.waiting():
                self._whole[index] = self._units[index].unshard()
        self._arrive(index)
        if ahead not in self._whole:
            self._whole[ahead] = self._units[ahead].unshard(async_op=True)

    def _arrive(self, index: int) -> None:
        if (handle := self._whole[index]) is not None:
            with self._traffic.waiting():
                handle.wait()
            self._whole[index] = None

    def _put_away(self, but: set[int]) -> None:
        for index in sorted(self._whole.keys() - but):
            self._arrive(index)
            del self._whole[index]
            self._units[index].reshard()


def _local(parameter: nn.Parameter) -> Tensor:
    """This rank's rows."""
    return cast(DTensor, parameter).to_local()


class _Bytes:
    """An all-gather of any dtype, as bytes: gloo, and NCCL before 2.24, know no fp8. Follows FSDP2's `AllGather`."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        output, mine = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return dist.all_gather_into_tensor(output, mine, group, async_op)


def _shard(unit: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    sharded.set_custom_all_gather(_Bytes())  # type: ignore[arg-type]  # its base class is private
    return sharded


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Gives each parameter memory for this rank's part. Buffers stay as they are: on the meta device, where none is
    used by mistake."""
    buffers = {(module, name): b for module in model.modules() for name, b in module._buffers.items()}
    model.to_empty(device=device)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer
