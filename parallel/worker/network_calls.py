"""What a worker does with networks of ComfyUI's own classes, beside steps and samplings."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..degrees import Degrees
from ..split import SequenceRanks
from ..wire.channel import Message
from ..wire.control import ControlPage
from ..wire.shared import Segment, TensorRef, lay_out
from ..wire.trees import flatten
from .network_homes import make_home
from .network_weights import Progress
from .ranks import ParallelContext, Ranks
from .split_network import SplitNetwork


class NetworkCalls:
    """What a worker does when the host asks it for such a network.

    Args:
        ranks: this rank among the others.
        device: where it computes.
        models: the worker's models by name; networks are put there, too.
        model: of a name, or an error that says what to do.
        tensor_at: the tensor of a reference in shared memory.
        control: the page by which a call can be stopped.
        progress: makes what is told how far loading has come.
        take: a segment of shared memory by its name; who asks for it owns it from then on.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        models: MutableMapping[str, Any],
        model: Callable[[str], Any],
        tensor_at: Callable[[dict[str, Any]], Tensor],
        control: Callable[[], ControlPage],
        progress: Callable[[], Progress],
        take: Callable[[str], Segment],
    ):
        self._ranks, self._device, self._models, self._model = ranks, device, models, model
        self._tensor_at, self._control, self._progress = tensor_at, control, progress
        self._take = take
        self._uncollected: dict[str, list[Tensor]] = {}
        self.operations: dict[str, Callable[[Message], dict[str, Any]]] = {
            "load network": self._load,
            "network weights": self._weights,
            "network call": self._call,
            "collect": self._collect,
        }

    def _load(self, message: Message) -> dict[str, Any]:
        """Builds a network and makes its weights resident."""
        if (old := self._models.pop(message["model"], None)) is not None:
            old.close()
        began = time.perf_counter()
        with torch.no_grad():
            home = make_home(message["weights"], self._ranks, self._take)
            network = SplitNetwork(message["source"], self._device, self._progress(), home, message["fp8"])
        self._models[message["model"]] = network
        weights_s = time.perf_counter() - began - network.libraries_s
        seconds = {"libraries": network.libraries_s, "weights": weights_s}
        return {"nbytes": network.nbytes, "fp8": network.fp8_report, "seconds": seconds}

    def _weights(self, message: Message) -> dict[str, Any]:
        network = self._network(message)
        network.forget_cache()
        for name, ref in message["put"].items():
            network.put_weight(name, self._tensor_at(ref))
        network.restore_weights(message["restore"])
        return {}

    def _call(self, message: Message) -> dict[str, Any]:
        """Runs this rank's part of a method. All ranks have the whole result, and each writes its share of it."""
        network = self._network(message)
        network.drop_conditioning(message["drop"])
        for key, ref in message["put"].items():
            network.put_conditioning(key, self._tensor_at(ref))
        mesh = self._ranks.mesh(Degrees(**message["degrees"]))
        context = ParallelContext(self._ranks, mesh, self._control())
        ranks: SequenceRanks = self._ranks.sequence(mesh, context, network.attention, message["method"])
        began = time.perf_counter()
        with torch.no_grad():
            result = network.call(message["method"], message["arguments"], message["held"], ranks)
            found: dict[str, Tensor] = {}
            structure = flatten(result, "", found)
            numbers = {name: str(i) for i, name in enumerate(found)}
            tensors = list(found.values())
            needed, out = self._write(tensors, message["room"])
        if needed > message["room"]["size"]:
            self._uncollected[message["model"]] = tensors
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        context.finish()
        return {
            "seconds": time.perf_counter() - began,
            **context.traffic.to_json(),
            "structure": _numbered(structure, numbers),
            "needed": needed,
            "out": out,
        }

    def _collect(self, message: Message) -> dict[str, Any]:
        """Writes the result of the last call, which did not fit."""
        needed, out = self._write(self._uncollected.pop(message["model"]), message["room"])
        return {"needed": needed, "out": out}

    def _write(self, tensors: list[Tensor], room: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Writes this rank's share of each tensor, if all fit: bytes needed, and where they lie."""
        refs, needed = lay_out(room["segment"], [(tensor.shape, tensor.dtype) for tensor in tensors])
        if needed <= room["size"]:
            rank, size = self._ranks.rank, self._ranks.world_size
            for tensor, ref in zip(tensors, refs, strict=True):
                first, last = (tensor.numel() * part // size for part in (rank, rank + 1))
                target = self._tensor_at(TensorRef.to_json(ref)).view(-1)
                target[first:last].copy_(tensor.reshape(-1)[first:last])
        return needed, [ref.to_json() for ref in refs]

    def _network(self, message: Message) -> SplitNetwork:
        network = self._model(message["model"])
        assert isinstance(network, SplitNetwork)
        return network


def _numbered(tree: Any, numbers: dict[str, str]) -> Any:
    """A result's structure with numbers for names."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return {"tensor": numbers[content]}
    if kind == "dict":
        return {kind: {name: _numbered(item, numbers) for name, item in content.items()}}
    return {kind: [_numbered(item, numbers) for item in content]}
