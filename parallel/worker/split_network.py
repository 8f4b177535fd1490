"""A network of ComfyUI's own class that this rank runs its part of, by a split plan."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache.blocks import BlockCache, StepPasses, block_cache
from ..cache.hooked import cached_blocks
from ..comfyui.start import prepare
from ..compilation.settings import CompileSettings
from ..errors import UnsupportedError
from ..plan import ranges, shares
from ..plans.comfyui import CHAINS, plan_of
from ..quantise.selection import Selection
from ..split import SequenceRanks, Split
from ..split.blocks import planned_blocks
from ..wire.trees import Tree, restore
from .network_fp8 import quantise
from .network_weights import MakeNetworkHome, NetworkHome, Progress, Replicated, by_block
from .packed import weights_of

if TYPE_CHECKING:
    from ..compilation.modules import CompiledModules

TensorAt = Callable[[dict[str, Any]], Tensor]
"""Place in shared memory → tensor."""


class SplitNetwork:
    """A network, its weights, and the conditioning that its prompts have sent.

    Args:
        source: `comfyui` and `arguments` (see `comfyui.start.prepare`); `path`; `weight_dtype`, or None; `network`, the
            class that the host's ComfyUI has found.
        device: where it runs.
        progress: called as weights arrive there.
        home: where they go there.
        fp8: `scheme` and `skip` of `quantise.settings.FP8Choice`, if linear layers of the blocks are to be quantised.

    Attributes:
        libraries_s: seconds that importing ComfyUI's code took.

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
        began = time.perf_counter()
        prepare(source["comfyui"], source["arguments"])
        library = importlib.import_module("..comfyui.network", __package__)
        self.libraries_s = time.perf_counter() - began
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
        plan = self._plan = plan_of(self._network)
        self._split = Split(self._network, plan, SequenceRanks((1.0,)))
        for module in self._network.modules():
            module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
        weights = weights_of(self._network, dtypes)
        self._selection: Selection | None = None
        if fp8 is not None:
            weights, self._selection = quantise(self._network, list(plan), weights, fp8, device)
        rest, blocks = by_block(weights, planned_blocks(self._network, plan))
        self.home: NetworkHome = home(rest, blocks, device, progress)
        self.home.skipping = lambda: self._split.streams.skipping
        self._held: dict[str, Tensor] = {}
        self._caches: dict[int, BlockCache] = {}
        self._compilers: dict[CompileSettings, CompiledModules] = {}

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

    def cache(self, sampling: int, rule: Mapping[str, Any]) -> BlockCache:
        """What the sampling of this number remembers, with the rule of its first step."""
        if sampling not in self._caches:
            self._caches[sampling] = block_cache(rule, self._device)
        return self._caches[sampling]

    def forget_cache(self, sampling: int | None = None) -> None:
        """Frees what a sampling remembers, or what all of them do."""
        if sampling is None:
            self._caches.clear()
        else:
            self._caches.pop(sampling, None)

    def compiled(self, settings: CompileSettings, sign_of_life: Callable[[], None]) -> CompiledModules:
        """The compiler of this network's blocks, kept as long as the network: MODELs that share it can want different
        ones.

        See `Compiler` for the arguments.
        """
        if settings not in self._compilers:
            from ..compilation.modules import CompiledModules  # takes a second, and is rarely wanted

            self._compilers[settings] = CompiledModules(settings, sign_of_life, self._device)
        return self._compilers[settings]

    def put_conditioning(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of what stays the same from step to step."""
        self._held[key] = tensor.to(self._device, copy=True)

    def drop_conditioning(self, keys: Iterable[str]) -> None:
        """Forgets what has been kept under these keys."""
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

    def step(
        self,
        request: Mapping[str, Any],
        rows: slice,
        tensor_at: TensorAt,
        ranks: SequenceRanks,
        passes: StepPasses | None = None,
        compiler: CompiledModules | None = None,
    ) -> None:
        """Runs the network on some samples, and writes this rank's share of the prediction.

        Args:
            request: see `host.step_request.StepRequest.plain`; `x`, `timestep` and `out` are places.
            rows: the samples, of those of x, out, and whatever else has as many.
            tensor_at: finds tensors in shared memory.
            ranks: that share the sequence.
            passes: of this request, if a cache may skip blocks.
            compiler: of the blocks, if they are to run compiled; each rank's own affair.

        Raises:
            UnsupportedError: the prediction has another shape than the latent.
        """
        x, timestep, out = (tensor_at(request[name]) for name in ("x", "timestep", "out"))
        latent = dict(_unpacked(x[rows].to(self._device, copy=True), request["parts"]))
        other = {name: self._held[key] for name, key in request["conditioning"].items()}
        other["timestep"] = timestep.to(self._device, copy=True)

        def tensor(name: str) -> Tensor:
            if name in latent:
                return latent[name]
            value = other[name]
            return value[rows] if value.ndim and len(value) == len(x) else value

        result = self._run("forward", restore(request["arguments"], tensor), ranks, passes, compiler)
        if not isinstance(result, Tensor):
            result = result[0] if len(result) == 1 else torch.cat([part.flatten(1) for part in result], 1)[:, None]
        mine = out[rows]
        if result.shape != mine.shape:
            raise UnsupportedError(
                f"{type(self._network).__name__} gives a result of {list(result.shape)} where {list(mine.shape)} was"
                " expected"
            )
        first, last = ranges(shares(mine.numel(), [1.0] * ranks.size))[ranks.rank]
        mine.view(-1)[first:last].copy_(result.reshape(-1)[first:last])

    def call(self, method: str, arguments: Tree, held: Mapping[str, str], ranks: SequenceRanks) -> Any:
        """Calls one of the network's methods; all ranks of the sequence call alike.

        Args:
            method: one of those that the plans' module lists.
            arguments: of the call, in order and by name.
            held: tensor's name there → key under which it is held.
            ranks: that share the sequence.

        Returns:
            The whole result, on every rank.
        """
        return self._run(method, restore(arguments, lambda name: self._held[held[name]]), ranks)

    def _run(
        self,
        method: str,
        given: Mapping[str, Any],
        ranks: SequenceRanks,
        passes: StepPasses | None = None,
        compiler: CompiledModules | None = None,
    ) -> Any:
        self._split.ranks = ranks
        function = self._network if method == "forward" else getattr(self._network, method)
        name = type(self._network).__name__
        with ExitStack() as during:
            during.enter_context(self.home.in_use(ranks.traffic))
            if compiler is not None:
                during.enter_context(compiler.on(self._split.blocks))
            if passes is not None:  # outside: what is skipped need not be compiled
                during.enter_context(cached_blocks(self._network, self._plan, CHAINS[name], self._split, passes))
            return function(*given["args"], **given["named"])


def _unpacked(x: Tensor, parts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """The latent by name, or its parts, as ComfyUI's `unpack_latents` cuts them."""
    if not parts:
        yield "x", x
        return
    start = 0
    for number, shape in enumerate(parts):
        stop = start + prod(shape)
        yield f"x.{number}", x[:, :, start:stop].reshape(len(x), *shape)
        start = stop
