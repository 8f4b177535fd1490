"""A worker's operations on its models other than steps and samplings: loading, changing weights, calling methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..wire.messages import Call, Collect, Conditioning, ForgetCache, Load, Room, Unload, Weights, WeightsHome
from ..wire.shared import lay_out
from ..wire.trees import flatten
from ..wire.typed import to_plain
from .homes import MakeHome, Replicated
from .host_link import HostLink
from .libraries import Libraries
from .offloaded import Offloaded
from .ranks import ParallelContext, Ranks
from .sharded import Sharded
from .split_network import SplitNetwork
from .tiles import Operations


class Models:
    """The models of one rank, by name."""

    def __init__(self, link: HostLink, ranks: Ranks, libraries: Libraries, give_memory_back: Callable[[], None]):
        self._link, self._ranks, self._libraries = link, ranks, libraries
        self._give_memory_back = give_memory_back
        self._models: dict[str, SplitNetwork] = {}
        self._uncollected: dict[str, list[Tensor]] = {}
        self.operations: Operations = {
            Load: self._load,
            Unload: self._unload,
            Weights: self._weights,
            ForgetCache: self._forget_cache,
            Call: self._call,
            Collect: self._collect,
        }

    def forget_caches(self) -> None:
        """Frees the caches of all samplings."""
        for model in self._models.values():
            model.forget_cache()

    def of(self, name: str) -> SplitNetwork:
        """Returns a model by name.

        Raises:
            EngineError: the model has been unloaded.
        """
        if name not in self._models:
            raise EngineError(f"the workers do not have {name} any more: queue the prompt again")
        return self._models[name]

    def conditioned(self, name: str, conditioning: Conditioning) -> SplitNetwork:
        """Returns a model by name, after applying the message's conditioning to it."""
        model = self.of(name)
        model.drop_conditioning(conditioning.drop)
        for key, ref in conditioning.put.items():
            model.put_conditioning(key, self._link.tensor(ref))
        return model

    def _load(self, message: Load) -> dict[str, Any]:
        """Builds a network and makes its weights resident."""
        self._drop(message.model)
        began = time.perf_counter()
        with torch.no_grad():
            model = SplitNetwork(
                message.recipe,
                self._ranks.device,
                self._link.loading(),
                self._home(message.home),
                message.fp8,
            )
        self._models[message.model] = model
        weights_s = time.perf_counter() - began - model.libraries_s
        seconds = {"libraries": self._libraries.take_waited() + model.libraries_s, "weights": weights_s}
        return {"nbytes": model.nbytes, "fp8": model.fp8_report, "seconds": seconds}

    def _home(self, wanted: WeightsHome) -> MakeHome:
        if wanted.mode == "shard":
            return partial(Sharded, group=self._ranks.weights_group(wanted.sharing))
        if wanted.mode == "offload":
            file = self._link.take(wanted.segment)
            return partial(Offloaded, file=file, rank=self._ranks.rank, ranks=self._ranks.world_size)
        return Replicated

    def _unload(self, message: Unload) -> dict[str, Any]:
        self._drop(message.model)
        self._give_memory_back()
        return {}

    def _drop(self, name: str) -> None:
        self._uncollected.pop(name, None)
        if (model := self._models.pop(name, None)) is not None:
            model.close()

    def _weights(self, message: Weights) -> dict[str, Any]:
        """Replaces or patches weights of the model, and restores the file's weights."""
        model = self.of(message.model)
        model.forget_cache()
        with torch.no_grad():
            for name, refs in message.put.items():
                model.put_weight(name, [self._link.tensor(ref) for ref in refs])
            for name, tree in message.patches.items():
                model.patch_weight(name, tree, lambda path: self._link.tensor(message.tensors[path]))
            model.restore_weights(message.restore)
        return {}

    def _forget_cache(self, message: ForgetCache) -> dict[str, Any]:
        if (model := self._models.get(message.model)) is not None:
            model.forget_cache(message.sampling)
        return {}

    def _call(self, message: Call) -> dict[str, Any]:
        """Runs this rank's part of a method. All ranks get the whole result, and each writes its share of it."""
        model, device = self.conditioned(message.model, message.conditioning), self._ranks.device
        mesh = self._ranks.mesh(message.degrees)
        context = ParallelContext(self._ranks, mesh, self._link.control)
        ranks = self._ranks.sequence(mesh, context, model.attention, message.method)
        began = time.perf_counter()
        with model.evaluating():
            result = model.call(message.method, message.arguments, message.held, ranks)
            found: dict[str, Tensor] = {}
            structure = flatten(result, "", found)
            numbers = {name: str(i) for i, name in enumerate(found)}
            tensors = list(found.values())
            needed, out = self._write(tensors, message.room)
        if needed > message.room.size:
            self._uncollected[message.model] = tensors
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        context.finish()
        return {
            "seconds": time.perf_counter() - began,
            **context.traffic.to_json(),
            "structure": _numbered(structure, numbers),
            "needed": needed,
            "out": out,
        }

    def _collect(self, message: Collect) -> dict[str, Any]:
        """Writes the result of the last call, which did not fit."""
        needed, out = self._write(self._uncollected.pop(message.model), message.room)
        return {"needed": needed, "out": out}

    def _write(self, tensors: list[Tensor], room: Room) -> tuple[int, list[dict[str, Any]]]:
        """Writes this rank's share of each tensor if all fit; returns the bytes needed and the tensors' places."""
        refs, needed = lay_out(room.segment, [(tensor.shape, tensor.dtype) for tensor in tensors])
        if needed <= room.size:
            rank, size = self._ranks.rank, self._ranks.world_size
            for tensor, ref in zip(tensors, refs, strict=True):
                first, last = (tensor.numel() * part // size for part in (rank, rank + 1))
                target = self._link.tensor(ref).view(-1)
                target[first:last].copy_(tensor.reshape(-1)[first:last])
        return needed, [to_plain(ref) for ref in refs]


def _numbered(tree: Any, numbers: dict[str, str]) -> Any:
    """Returns a result's structure with the tensor names replaced by numbers."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return {"tensor": numbers[content]}
    if kind == "dict":
        return {kind: {name: _numbered(item, numbers) for name, item in content.items()}}
    return {kind: [_numbered(item, numbers) for item in content]}
