"""A network of ComfyUI's own class that this rank runs its part of, by a split plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comfyui.start import prepare
from ..errors import UnsupportedError
from ..plans.comfyui import plan_of
from ..quantise.selection import Selection
from ..split import SequenceRanks, Split
from ..split.blocks import planned_blocks
from ..wire.trees import Tree, restore
from .network_fp8 import quantise
from .network_weights import MakeNetworkHome, NetworkHome, Progress, Replicated, by_block
from .packed import weights_of


class SplitNetwork:
    """A network, its weights, and the conditioning that its prompts have sent.

    Args:
        source: `comfyui` and `arguments` (see `comfyui.start.prepare`); `path`; `weight_dtype`, or None; `network`, the
            class that the host's ComfyUI has found.
        device: where it runs.
        progress: called as weights arrive there.
        home: where they go there.
        fp8: `scheme` and `skip` of `quantise.settings.FP8Choice`, if linear layers of the blocks are to be quantised.

    Raises:
        UnsupportedError: ComfyUI makes another network of it here, or it has no plan.
        PlanError: its class has changed.
        ConfigError: `skip` has a pattern that means no layer.
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        device: torch.device,
        progress: Progress,
        home: MakeNetworkHome = Replicated,
        fp8: Mapping[str, Any] | None = None,
    ):
        prepare(source["comfyui"], source["arguments"])
        library = importlib.import_module("..comfyui.network", __package__)
        dtype = None if source["weight_dtype"] is None else getattr(torch, source["weight_dtype"])
        self._file: Any = library.NetworkFile(source["path"], dtype, device)
        self._network: nn.Module
        self._network, dtypes = self._file.network()
        if type(self._network).__name__ != source["network"]:
            raise UnsupportedError(
                f"{source['path']}: ComfyUI makes a {source['network']} of it, and the workers"
                f" a {type(self._network).__name__}"
            )
        self.attention: str = library.attention_name()
        """What its attention computes with, by the names of `attention.kernels`."""
        self._device = device
        plan = plan_of(self._network)
        self._split = Split(self._network, plan, SequenceRanks((1.0,)))
        for module in self._network.modules():
            module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
        weights = weights_of(self._network, dtypes)
        self._selection: Selection | None = None
        if fp8 is not None:
            weights, self._selection = quantise(self._network, list(plan), weights, fp8, device)
        rest, blocks = by_block(weights, planned_blocks(self._network, plan))
        self.home: NetworkHome = home(rest, blocks, device, progress)
        self._held: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device, between calls."""
        return self.home.nbytes + sum(buffer.nbytes for buffer in self._network.buffers())

    @property
    def fp8_report(self) -> dict[str, int] | None:
        """What has been quantised: the counts of `quantise.settings.FP8Report`, and what a copy saves in bytes."""
        return None if self._selection is None else self._selection.counts

    def close(self) -> None:
        """Before it goes."""
        self._split.remove()
        self.home.close()

    def forget_cache(self, sampling: int | None = None) -> None:
        """It remembers nothing between steps."""

    def hold(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of what stays the same from step to step."""
        self._held[key] = tensor.to(self._device, copy=True)

    def drop(self, keys: list[str]) -> None:
        """Forgets what `hold` has kept under these keys."""
        for key in keys:
            self._held.pop(key, None)

    def put_weight(self, name: str, tensor: Tensor) -> None:
        """Replaces a weight, by the network's name, by a copy of another tensor of its shape.

        Raises:
            CheckpointError: there is no such weight, or it is a quantised one.
        """
        self.home.put(name, tensor.clone())

    def restore_weights(self, names: Sequence[str]) -> None:
        """Undoes `put_weight`: reads the file's again."""
        if names:
            tensors = self._file.tensors()
            for name in names:
                self.home.put(name, tensors[name])

    def call(
        self,
        method: str,
        arguments: Tree,
        held: Mapping[str, str],
        read: Callable[[str], Tensor],
        ranks: SequenceRanks,
    ) -> Any:
        """Calls the network, or one of its methods, as ComfyUI would; all ranks of the sequence call alike.

        Args:
            method: `forward`, or one of those that the plans' module lists.
            arguments: of the call, in order and by name.
            held: tensor's name there → key under which it is held.
            read: any other tensor, on this rank's device.
            ranks: that share the sequence.

        Returns:
            The whole result, on every rank.
        """
        given = restore(arguments, lambda name: self._held[held[name]] if name in held else read(name))
        self._split.ranks = ranks
        function = self._network if method == "forward" else getattr(self._network, method)
        with self.home.in_use(ranks.traffic):
            return function(*given["args"], **given["named"])
