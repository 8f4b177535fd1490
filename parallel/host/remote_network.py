"""A network of ComfyUI's own class in the workers, as the host holds it: its weights, its calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.settings import CacheSettings
from ..compilation.settings import CompileSettings
from ..config import SequenceParallelConfig
from ..degrees import Degrees
from ..errors import UnsupportedError
from ..plan import share_of
from ..quantise.selection import LinearLayer, Selection, select_layers
from ..quantise.settings import NODE, FP8Settings, likely_scheme, refuse_devices
from ..wire.shared import TensorRef, lay_out
from ..wire.trees import flatten, restore
from . import network_cache, running
from .cached_sampling import CachedSampling
from .group import Poll, Progress
from .held_weights import HeldWeights
from .remote_transformer import RemoteTransformer
from .step_request import StepRequest

_MODELS = itertools.count(1)
_ROOM = 1 << 20
"""Bytes for a method's results; more are collected by a second message."""

Replace = Callable[[str], Tensor]
"""Name of a weight → what the workers are to use, of its shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRecipe:
    """What the workers build. Nothing is read from disk, and no process is started."""

    path: str
    weight_dtype: torch.dtype | None
    """As the user chose it; None leaves it to ComfyUI."""
    network: str
    """Name of ComfyUI's class."""
    comfyui: str
    """Folder of ComfyUI."""
    arguments: Mapping[str, Any]
    """Its command line, see `vae.arguments.as_plain`."""
    config: SequenceParallelConfig
    nbytes: int
    """Of the weights, as the workers keep them."""
    in_the_file: int
    """How many of these are in the file as they are."""
    heads: int
    """Of its attention; of several kinds the fewest."""
    unet_config: Mapping[str, Any]
    """What ComfyUI's detection has found."""
    channels: int
    """Of the latent."""
    linear: tuple[LinearLayer, ...]
    """Its linear layers, for FP8; none of a file that is quantised."""
    quantised: str = ""
    """How the file is quantised."""

    def to_json(self) -> dict[str, Any]:
        dtype = None if self.weight_dtype is None else str(self.weight_dtype).removeprefix("torch.")
        named = {name: getattr(self, name) for name in ("path", "network", "comfyui", "arguments")}
        return {**named, "weight_dtype": dtype}


class RemoteNetwork(HeldWeights, RemoteTransformer):
    """A network that computes in the workers. Its weights may come and go: `ensure_loaded` brings them back.

    Args:
        recipe: what to load.

    Raises:
        ConfigError: the configuration does not fit this machine.
    """

    output_dtype = torch.float32
    """Holds whatever the network computes in; ComfyUI converts its predictions to it next."""

    def __init__(self, recipe: NetworkRecipe):
        HeldWeights.__init__(self, f"network-{next(_MODELS)}", recipe.path, recipe.config, recipe.network)
        RemoteTransformer.__init__(self, self.name)
        self.recipe = recipe
        self._version: Hashable = None
        self._replaced: set[str] = set()

    @property
    def heads(self) -> int:
        return self.recipe.heads

    def check_request(self, request: StepRequest, degrees: Degrees) -> None:
        """What the inputs must be, the plan's rules say where they cut them; a short sequence is no reason."""

    def output_shape(self, request: StepRequest) -> tuple[int, ...]:
        """The latent's, without channels that ComfyUI has put behind it."""
        batch, channels, *rest = request.x.shape
        return batch, channels if request.parts else min(channels, self.recipe.channels), *rest

    def work(self) -> Hashable:
        return self.recipe.path, self.recipe.weight_dtype, self._fp8

    def _chosen(self, conditions: int, requests: Sequence[StepRequest]) -> tuple[Degrees, str]:
        """Batch groups only where they need not take apart what may be no batch."""
        degrees, reason = super()._chosen(conditions, requests)
        batches = [len(request.x) for request in requests]
        for group in range(degrees.groups if requests else 0):
            for request, rows in zip(requests, share_of(batches, group, degrees.groups), strict=True):
                if 0 < rows.stop - rows.start < len(request.x) and (name := _indivisible(request)):
                    return self._all_in_one(degrees), f"{name} cannot be taken apart by samples"
        return degrees, reason

    def _all_in_one(self, degrees: Degrees) -> Degrees:
        """All ranks share one sequence, with the same rings."""
        return Degrees(ring=degrees.ring, ulysses=self._layout.world_size // degrees.ring)

    def _whole_bytes(self, fp8: FP8Settings | None) -> int:
        """Of a whole copy of the weights."""
        return self.recipe.nbytes - (0 if fp8 is None else self.select_fp8(fp8).saved)

    def ensure_loaded(
        self, poll: Poll | None = None, on_progress: Progress | None = None, *, fp8: FP8Settings | None = None
    ) -> int:
        """Starts workers and loads the weights unless both have been done.

        Args:
            poll: see `WorkerGroup.call`.
            on_progress: told in bytes.
            fp8: quantises them on the way; other settings than those in place load them anew.

        Returns:
            Bytes of weights on one worker.

        Raises:
            UnsupportedError: `fp8`, and the file is quantised.
            ConfigError: an offload needs more memory than the host has, or the devices cannot do what `fp8` asks for.
            WorkerError: loading failed.
        """
        if fp8 is not None:
            self.select_fp8(fp8)  # refuses before any worker is started
        group = running.acquire(self.recipe.config, poll)
        in_the_file = self.recipe.in_the_file if fp8 is None else 0
        source = {"source": self.recipe.to_json()}
        return self._load_into(group, "load network", source, fp8, poll, on_progress, in_the_file=in_the_file)

    def select_fp8(self, fp8: FP8Settings) -> Selection:
        """What `fp8` will do to this network, told without workers.

        Raises:
            UnsupportedError: the file is quantised: its own format is what ComfyUI's layers compute in.
            ConfigError: the devices cannot do it, or `skip` has a pattern that means no layer.
        """
        if self.recipe.quantised:
            raise UnsupportedError(
                f"{NODE} cannot quantise {self.recipe.network} of {self.recipe.path}: the file is quantised"
                f" already ({self.recipe.quantised}); remove the node, or use a bf16 or fp16 file"
            )
        refuse_devices(fp8, self._layout)
        scheme = likely_scheme(fp8, self._layout)
        return select_layers(self.recipe.linear, scheme=scheme, skip=fp8.patterns)

    def cache_message(self, cache: CachedSampling, sigma: float, request: StepRequest) -> dict[str, Any]:
        return network_cache.cache_message(cache, sigma, self.recipe.network, self.recipe.unet_config, request.shapes)

    def check_cache(self, settings: CacheSettings) -> None:
        network_cache.check_cache(settings, self.recipe.network, self.recipe.unet_config)

    def check_compile(self, settings: CompileSettings) -> None:
        """The blocks of every class with a split plan can be compiled, or run as they are."""

    def replace_weights(
        self,
        version: Hashable,
        names: Collection[str],
        replace: Replace,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Restores the file's weights, then replaces `names`. Only weights replaced now or by the last call travel.

        Args:
            version: what `names` and `replace` stand for; with the one that is in place nothing is done.
            names: of weights, as the network has them.
            replace: runs in the caller's thread, for one weight at a time, starting from the file's.
            poll: see `WorkerGroup.call`; also called before each weight.
            on_progress: told in weights.
        """
        if version == self._version:
            return
        group = self._group
        assert group is not None, "call ensure_loaded first"
        self._version = object()  # whatever ends this early, the next call does it all
        if restored := sorted(self._replaced - set(names)):
            group.call("network weights", {"model": self.name, "put": {}, "restore": restored}, poll=poll)
            self._replaced -= set(restored)
        for done, name in enumerate(sorted(names)):
            if poll is not None:
                poll()
            value = replace(name)
            group.settle(poll)
            (ref,), size = lay_out("weights", [(value.shape, value.dtype)])
            group.memory.segment("weights", size).tensor(ref).copy_(value)
            self._replaced.add(name)
            message = {"model": self.name, "put": {name: ref.to_json()}, "restore": []}
            group.call("network weights", message, poll=poll)
            if on_progress is not None:
                on_progress(done + 1, len(names))
        self._version = version

    def call(self, method: str, args: Sequence[Any], named: Mapping[str, Any], *, poll: Poll | None = None) -> Any:
        """The result of one of the network's methods that needs weights, on the device of the first tensor.

        Args:
            method: one of those that the plans' module lists.
            args, named: nests of tensors and plain data.
            poll: see `WorkerGroup.call`.

        Raises:
            NotPlain: something cannot travel; before any work.
            WorkerError: a worker failed; the weights are gone unless `loaded` still says otherwise.
        """
        tensors: dict[str, Tensor] = {}
        first = [flatten(value, str(i), tensors) for i, value in enumerate(args)]
        tree = {"dict": {"args": {"list": first}, "named": flatten(dict(named), "named", tensors)}}
        group, (degrees, _) = self._group, self._chosen(1, ())
        assert group is not None, "call ensure_loaded first"
        degrees = self._all_in_one(degrees)
        group.settle(poll)
        (keys,), put, drop = self._conditioning.update([tensors], group)
        room = _ROOM
        results = group.memory.segment("call-results", room)
        message = {
            "model": self.name,
            "method": method,
            "degrees": asdict(degrees),
            "arguments": tree,
            "held": keys,
            "put": put,
            "drop": drop,
            "room": {"segment": "call-results", "size": room},
        }
        try:
            told = group.call("network call", message, poll=poll)
            if (needed := told[0]["needed"]) > room:
                results = group.memory.segment("call-results", needed)
                message = {"model": self.name, "room": {"segment": "call-results", "size": needed}}
                told = [{**told[0], **collected} for collected in group.call("collect", message, poll=poll)]
        except BaseException:
            self._conditioning.clear()
            raise
        device = next(iter(tensors.values())).device
        refs = [TensorRef.from_json(ref) for ref in told[0]["out"]]
        found = {str(i): results.tensor(ref).clone().to(device) for i, ref in enumerate(refs)}
        return restore(told[0]["structure"], found.__getitem__)

    def _forgotten(self) -> None:
        self._version = None
        self._replaced.clear()
        self._conditioning.clear()


def _indivisible(request: StepRequest) -> str:
    """The first tensor that may be of other things than the samples; empty if there is none.

    Tensors in lists are conditioning, with samples first, as all that ComfyUI concatenates for a batch; in a dictionary
    they are what a model makes of itself.
    """
    for name, tensor in request.conditioning.items():
        in_dictionary = any(not part.isdigit() for part in name.split(".")[1:])
        if tensor.ndim and len(tensor) not in ((1,) if in_dictionary else (1, len(request.x))):
            return name
    return ""
