"""A network of ComfyUI's or diffusers' own class, of which this rank runs its part under a split plan."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.blocks import BlockCache, StepPasses, block_cache
from ..cache.hooked import cached_blocks
from ..compilation.settings import CompileSettings
from ..errors import UnsupportedError
from ..plan import ranges, shares
from ..plans.comfyui import handed_on
from ..plans.libraries import CHAINS
from ..quantise.selection import Selection
from ..sampling.step_request import OF_ALL_SAMPLES
from ..split import SequenceRanks, Split
from ..split.blocks import planned_blocks
from ..split.handing_on import skippable
from ..split.routes import OPTIONS, OVERRIDE, REPLACED
from ..wire.messages import Request
from ..wire.plain import plain_tensors
from ..wire.shared import TensorRef
from ..wire.trees import Tree, restore
from .finite import FirstNotFinite, all_finite
from .fp8_weights import quantise
from .homes import Home, MakeHome, Progress, Replicated, by_block
from .libraries import library_of
from .packed import QuantisedWeight, weights_of
from .token_scales import TokenScales

if TYPE_CHECKING:
    from ..compilation.modules import CompiledModules

_ANY = torch.empty(0)
"""Placeholder for every tensor when only argument names are checked."""

TensorAt = Callable[[TensorRef], Tensor]
"""Maps a place in shared memory to its tensor."""


class SplitNetwork:
    """A network, its weights, and the conditioning that the host has sent.

    Args:
        recipe: see `host.recipe.Recipe.to_json`.
        device: device that the network runs on.
        progress: called as weights are loaded.
        home: factory of the storage of the weights.
        fp8: `scheme` and `skip` of `quantise.settings.FP8Choice`, if linear layers of the blocks are to be quantised.

    Attributes:
        libraries_s: seconds that importing the library took.
        attention: name of the network's attention kernel, as in `attention.kernels`.

    Raises:
        UnsupportedError: the library builds a different network in the worker.
        PlanError: the network's class has changed.
        CheckpointError: the file is damaged.
        ConfigError: `skip` has a pattern that matches no layer.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        device: torch.device,
        progress: Progress,
        home: MakeHome = Replicated,
        fp8: Mapping[str, Any] | None = None,
    ):
        began = time.perf_counter()
        open_file = library_of(recipe)
        self.libraries_s = time.perf_counter() - began
        dtype = None if recipe["weight_dtype"] is None else getattr(torch, recipe["weight_dtype"])
        self._file = open_file(recipe["path"], dtype, device)
        self._network, dtypes = self._file.network()
        name = type(self._network).__name__
        if name != recipe["network"]:
            raise UnsupportedError(
                f"{recipe['path']}: the host makes a {recipe['network']} of it, the workers a {name}"
            )
        self.attention = self._file.attention
        self._device = device
        self._chain = CHAINS[recipe["library"]].get(name)
        plan = self._plan = self._file.plan(self._network)
        self._split = Split(self._network, plan, SequenceRanks((1.0,)), self._file.routes)
        for module in self._network.modules():
            module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
        weights = weights_of(self._network, dtypes)
        self._selection: Selection | None = None
        if fp8 is not None:
            weights, self._selection = quantise(self._network, list(plan), weights, fp8, device)
        self._scales = TokenScales(self._network)
        self._quantised = {w.name: plain_tensors(w.value) for w in weights if isinstance(w, QuantisedWeight)}
        """The file's quantised weights as mapped tensors, by name."""
        self._patched: set[str] = set()
        """Names of the weights whose layers add patches."""
        rest, blocks = by_block(weights, planned_blocks(self._network, plan))
        self.home: Home = home(rest, blocks, device, progress)
        self.home.skipping = lambda: self._split.streams.skipping
        self._held: dict[str, Tensor] = {}
        self._caches: dict[int, BlockCache] = {}
        self._compilers: dict[CompileSettings, CompiledModules] = {}

    def evaluating(self) -> AbstractContextManager[None]:
        """Returns a context without gradients; inference mode, as in ComfyUI, if weights are quantised. Outside of it
        PyTorch decomposes a linear layer before comfy-kitchen sees it, so that products are not bit-identical."""
        return torch.inference_mode() if self._quantised else torch.no_grad()

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device, between calls."""
        return self.home.nbytes + sum(buffer.nbytes for buffer in self._network.buffers())

    @property
    def fp8_report(self) -> dict[str, int] | None:
        """Counts of `quantise.settings.FP8Report`, and the bytes that each copy saves; None without quantisation."""
        if self._selection is None:
            return None
        names = (name.removesuffix(".weight") for name in self._selection.weights)
        restored = sum(getattr(self._network.get_submodule(name), "_full_precision_mm", False) for name in names)
        return self._selection.counts | {"restored": restored}

    def close(self) -> None:
        """Removes the split plan's hooks and releases the weights."""
        self._split.remove()
        self.home.close()

    def cache(self, sampling: int, rule: Mapping[str, Any]) -> BlockCache:
        """Returns the cache of sampling number `sampling`, created at its first step with that step's rule."""
        if sampling not in self._caches:
            self._caches[sampling] = block_cache(rule, self._device)
        return self._caches[sampling]

    def forget_cache(self, sampling: int | None = None) -> None:
        """Frees the cache of one sampling, or of all samplings if `sampling` is None."""
        if sampling is None:
            self._caches.clear()
        else:
            self._caches.pop(sampling, None)

    def compiled(self, settings: CompileSettings | None, sign_of_life: Callable[[], None]) -> CompiledModules | None:
        """Returns the compiler of this network's blocks for these settings; None without settings.

        Compilers are kept as long as the network, because MODELs that share the network may use different settings, or
        none. See `CompiledModules` for the arguments.
        """
        if settings is None:
            return None
        if settings not in self._compilers:
            from ..compilation.modules import CompiledModules  # takes a second, and is rarely needed

            self._compilers[settings] = CompiledModules(settings, sign_of_life, self._device)
        return self._compilers[settings]

    def put_conditioning(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of a tensor that stays the same from step to step."""
        self._held[key] = tensor.to(self._device, copy=True)

    def drop_conditioning(self, keys: Iterable[str]) -> None:
        """Drops the tensors that are kept under these keys."""
        for key in keys:
            self._held.pop(key, None)

    def put_weight(self, name: str, pieces: Sequence[Tensor]) -> None:
        """Replaces a weight by a copy of another weight of the same shape.

        Args:
            name: name of the weight in the network.
            pieces: the new weight's plain tensors (`wire.plain.plain_tensors`).

        Raises:
            CheckpointError: there is no such weight, or the pieces do not fit it.
        """
        self.home.put(name, [piece.clone() for piece in pieces])

    def patch_weight(self, name: str, patches: Tree, tensor_at: Callable[[str], Tensor]) -> None:
        """Replaces the patches that the layer of a GGUF file's weight adds to it.

        Args:
            name: name of the weight in the network.
            patches: result of `comfyui.gguf.plain_patches`.
            tensor_at: finds the patches' tensors in shared memory; they are copied.

        Raises:
            CheckpointError: there is no such weight, or it is not quantised.
        """
        from ..comfyui import gguf  # imports ComfyUI, which provides this network

        nest = restore(patches, lambda path: tensor_at(path).to(self._device, copy=True))
        self.home.patch(name, gguf.patches_of(nest, name))
        self._patched.add(name)

    def restore_weights(self, names: Sequence[str]) -> None:
        """Undoes `put_weight` and `patch_weight` from the file's weights; those methods have refused other names."""
        tensors = self._file.tensors() if any(name not in self._quantised for name in names) else {}
        for name in names:
            if name in self._patched:
                self.home.patch(name, [])
                self._patched.remove(name)
            elif name in self._quantised:
                self.home.put(name, self._quantised[name])
            elif name in tensors:
                self.home.put(name, [tensors[name]])

    def check_arguments(self, arguments: Tree, method: str = "forward") -> dict[str, Any]:
        """Refuses a call that does not fit the method's signature.

        All ranks refuse it before any exchange, so they stay usable.

        Returns:
            The arguments, `args` and `named`, with every tensor replaced by an empty one.

        Raises:
            UnsupportedError: the arguments do not fit; the message names the argument and the method's parameters.
        """
        given: dict[str, Any] = restore(arguments, lambda name: _ANY)
        signature = _signature(getattr(type(self._network), method))
        try:
            signature.bind(self._network, *given["args"], **given["named"])
        except TypeError as error:
            _, *names = signature.parameters
            raise UnsupportedError(
                f"{type(self._network).__name__}.{method}: {error}; it takes {', '.join(names)}"
            ) from None
        return given

    def check_request(self, request: Request, ring_degree: int, kernel: str | None) -> str:
        """Refuses a call that cannot be honoured under these degrees, as `check_arguments` does.

        Args:
            kernel: attention kernel chosen in SP Config, if any.

        Returns:
            The name of the attention kernel that the call uses, as in `attention.kernels`.

        Raises:
            UnsupportedError: SP Config and a node have chosen different attentions, or the ring requires a log-sum-exp
                that the chosen attention does not return.
        """
        given = self.check_arguments(request.arguments)
        name = given["named"].get(OPTIONS, {}).get(OVERRIDE)
        if name is None:
            return self.attention
        sdpa = name == "pytorch"  # its results can also be merged in a ring
        if ring_degree > 1 and not sdpa:
            raise UnsupportedError(
                f"the attention {name!r}, which a node chooses (ModelAttentionBackend), cannot be used in a ring,"
                " which merges its parts by their log-sum-exp: this attention gives none. Set ring_degree, now"
                f" {ring_degree}, to 1 in SP Config, or remove the node"
            )
        if kernel is not None and not (sdpa and kernel == "sdpa"):
            raise UnsupportedError(
                f"SP Config chooses the attention {kernel!r}, but a node (ModelAttentionBackend) chooses {name!r}: set"
                " attention to auto in SP Config, or remove the node"
            )
        from ..comfyui.attention import computes, registered  # imports ComfyUI, which provides this network

        registered(name)
        return computes(name)

    def watch(self) -> FirstNotFinite:
        """Returns a watcher that finds the block after which values stop being finite."""
        return FirstNotFinite(self._network, self._plan)

    def step(
        self,
        request: Request,
        rows: slice,
        tensor_at: TensorAt,
        ranks: SequenceRanks,
        passes: StepPasses | None = None,
        compiler: CompiledModules | None = None,
        watch: FirstNotFinite | None = None,
    ) -> Tensor:
        """Runs the network on some samples, and writes this rank's share of the prediction.

        Args:
            request: the call.
            rows: the samples to run, as a slice of x, out and every other tensor with as many samples.
            tensor_at: finds tensors in shared memory.
            ranks: the ranks that share the sequence.
            passes: passes of this request, if a cache may skip blocks.
            compiler: compiler of the blocks, if they are to run compiled; ranks need not agree on it.
            watch: checks the inputs.

        Returns:
            A boolean tensor on the device: whether this rank's share is finite.

        Raises:
            UnsupportedError: the shape of the prediction differs from that of `out`.
        """
        x, timestep, out = (tensor_at(place) for place in (request.x, request.timestep, request.out))
        latent = dict(_unpacked(x[rows].to(self._device, copy=True), request.parts))
        other = {name: self._held[key] for name, key in request.conditioning.items()}
        other["timestep"] = timestep.to(self._device, copy=True)

        def tensor(name: str) -> Tensor:
            if name in latent:
                return latent[name]
            value = other[name]
            of_each = value.ndim and len(value) == len(x) and name not in OF_ALL_SAMPLES
            return value[rows] if of_each else value

        if watch is not None:
            watch.given(latent | other)
        result = self._run("forward", restore(request.arguments, tensor), ranks, passes, compiler)
        if not isinstance(result, Tensor):
            result = result[0] if len(result) == 1 else torch.cat([part.flatten(1) for part in result], 1)[:, None]
        mine = out[rows]
        if result.shape != mine.shape:
            raise UnsupportedError(
                f"{type(self._network).__name__} gives a result of {list(result.shape)} where {list(mine.shape)} was"
                " expected"
            )
        first, last = ranges(shares(mine.numel(), [1.0] * ranks.size))[ranks.rank]
        share = result.reshape(-1)[first:last]
        mine.view(-1)[first:last].copy_(share)
        return all_finite(share)

    def call(self, method: str, arguments: Tree, held: Mapping[str, str], ranks: SequenceRanks) -> Any:
        """Calls one of the network's methods; all ranks of the sequence make the same call.

        Args:
            method: one of the methods that the plans' module lists.
            arguments: positional and named arguments of the call.
            held: maps the name of each tensor in `arguments` to the key under which it is kept.
            ranks: the ranks that share the sequence.

        Returns:
            The whole result, on every rank.
        """
        self.check_arguments(arguments, method)
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
        options = given["named"].get(OPTIONS, {})
        function = self._network if method == "forward" else getattr(self._network, method)
        with ExitStack() as during:
            during.enter_context(self.home.in_use(ranks.traffic))
            during.enter_context(self._scales.over(ranks))
            if compiler is not None:  # a graph cannot exchange the largest value with other ranks
                shared = ranks.size > 1 and self._scales.layers
                during.enter_context(compiler.on([] if shared else self._split.blocks))
            if (name := options.get(OVERRIDE)) is not None:
                from ..comfyui.attention import registered

                chosen = registered(name)
                options[OVERRIDE] = lambda own, *args, **kwargs: chosen(*args, **kwargs)
            if layers := options.get(REPLACED):
                returned = handed_on(type(self._network).__name__)
                skip = during.enter_context(skippable(self._network, self._plan, returned, self._split))
                options[REPLACED] = {"dit": {(kind, number): skip for kind in layers for number in layers[kind]}}
            if passes is not None:  # wraps the compiled blocks: skipped blocks need not be compiled
                assert self._chain is not None, "the host has refused"
                during.enter_context(cached_blocks(self._network, self._plan, self._chain, self._split, passes))
            return function(*given["args"], **given["named"])


def _unpacked(x: Tensor, parts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the latent by name, or its parts, as ComfyUI's `unpack_latents` splits them."""
    if not parts:
        yield "x", x
        return
    start = 0
    for number, shape in enumerate(parts):
        stop = start + prod(shape)
        yield f"x.{number}", x[:, :, start:stop].reshape(len(x), *shape)
        start = stop


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the function's signature, cached because each step needs it."""
    return inspect.signature(function)
