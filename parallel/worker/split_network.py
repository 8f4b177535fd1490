"""A network of ComfyUI's own class that this rank runs its part of, by a split plan."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..comfyui.start import prepare
from ..compilation.settings import CompileSettings
from ..errors import CheckpointError, UnsupportedError
from ..plans.comfyui import plan_of
from ..split import SequenceRanks, Split
from ..wire.trees import Tree, restore

if TYPE_CHECKING:
    from ..compilation.modules import CompiledModules

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total; may raise StepCancelled."""


class SplitNetwork:
    """A network, its weights, and the conditioning that its prompts have sent.

    Args:
        source: `comfyui` and `arguments` (see `comfyui.start.prepare`); `path`; `weight_dtype`, or None; `network`, the
            class that the host's ComfyUI has found.
        device: where it runs.
        progress: called as weights arrive there.

    Raises:
        UnsupportedError: ComfyUI makes another network of it here, or it has no plan.
        PlanError: its class has changed.
    """

    def __init__(self, source: Mapping[str, Any], device: torch.device, progress: Progress):
        prepare(source["comfyui"], source["arguments"])
        library = importlib.import_module("..comfyui.network", __package__)
        dtype = None if source["weight_dtype"] is None else getattr(torch, source["weight_dtype"])
        self._network: nn.Module = library.load_network(source["path"], dtype, device, progress)
        if type(self._network).__name__ != source["network"]:
            raise UnsupportedError(
                f"{source['path']}: ComfyUI makes a {source['network']} of it, and the workers"
                f" a {type(self._network).__name__}"
            )
        self.nbytes: int = library.nbytes(self._network)
        self.attention: str = library.attention_name()
        """What its attention computes with, by the names of `attention.kernels`."""
        self._device = device
        self._split = Split(self._network, plan_of(self._network), SequenceRanks((1.0,)))
        self._held: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor] = {}
        self._compilers: dict[CompileSettings, CompiledModules] = {}

    def close(self) -> None:
        """Before it goes."""
        self._split.remove()

    def forget_cache(self, sampling: int | None = None) -> None:
        """It remembers nothing between steps."""

    def compiled(self, settings: CompileSettings, sign_of_life: Callable[[], None]) -> CompiledModules:
        """The compiler of this network's blocks, kept as long as the network: MODELs that share it can want different
        ones.

        See `Compiler` for the arguments.
        """
        if settings not in self._compilers:
            from ..compilation.modules import CompiledModules  # takes a second, and is rarely wanted

            self._compilers[settings] = CompiledModules(settings, sign_of_life, self._device)
        return self._compilers[settings]

    def hold(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of what stays the same from step to step."""
        self._held[key] = tensor.to(self._device, copy=True)

    def drop(self, keys: list[str]) -> None:
        """Forgets what `hold` has kept under these keys."""
        for key in keys:
            self._held.pop(key, None)

    def put_weight(self, name: str, tensor: Tensor) -> None:
        """Replaces a weight, by the network's name, by a copy of another tensor of its shape; keeps the file's.

        Raises:
            CheckpointError: there is no such weight.
        """
        module, leaf = self._place(name)
        current = module._parameters[leaf]
        assert current is not None and current.shape == tensor.shape, name
        self._replaced.setdefault(name, current.data)
        module._parameters[leaf] = nn.Parameter(tensor.to(self._device, copy=True), requires_grad=False)

    def restore_weight(self, name: str) -> None:
        """Undoes `put_weight`."""
        module, leaf = self._place(name)
        if name in self._replaced:
            module._parameters[leaf] = nn.Parameter(self._replaced.pop(name), requires_grad=False)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        module = self._network.get_submodule(path)
        if leaf not in module._parameters:
            raise CheckpointError(f"the network has no weight {name!r}")
        return module, leaf

    def call(
        self,
        method: str,
        arguments: Tree,
        held: Mapping[str, str],
        read: Callable[[str], Tensor],
        ranks: SequenceRanks,
        compiler: CompiledModules | None = None,
    ) -> Any:
        """Calls the network, or one of its methods, as ComfyUI would; all ranks of the sequence call alike.

        Args:
            method: `forward`, or one of those that the plans' module lists.
            arguments: of the call, in order and by name.
            held: tensor's name there → key under which it is held.
            read: any other tensor, on this rank's device.
            ranks: that share the sequence.
            compiler: of the blocks, if they are to run compiled; each rank's own affair.

        Returns:
            The whole result, on every rank.
        """
        given = restore(arguments, lambda name: self._held[held[name]] if name in held else read(name))
        self._split.ranks = ranks
        function = self._network if method == "forward" else getattr(self._network, method)
        with contextlib.nullcontext() if compiler is None else compiler.on(self._split.blocks):
            return function(*given["args"], **given["named"])
