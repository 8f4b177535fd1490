"""Tiny models, and the inputs of one step for them.

They are diffusers' own classes: the engine's tests need no ComfyUI. Those of ComfyUI's classes are in `tests/comfyui`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import read_config, recipe, transformer_class
from parallel.diffusers.request import request as request_of
from parallel.diffusers.tiny import tiny_request, write_tiny
from parallel.host.group import WorkerGroup
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.sampling.step_request import StepRequest
from parallel.wire.trees import restore
from tests.aligned import align
from tests.distributed.devices import on_ranks

StartGroup = Callable[[str], WorkerGroup]
HUNYUAN, FLUX = "HunyuanVideoTransformer3DModel", "FluxTransformer2DModel"
WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
NETWORKS = (HUNYUAN, FLUX, WAN, COGVIDEOX)


class TinyModels:
    """A folder of folders; asking twice for the same one writes it once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: dict[str, Path] = {}

    def path(self, network: str = HUNYUAN, **options: Any) -> Path:
        """What `parallel.diffusers.tiny.write_tiny` makes of these options."""
        key = repr((network, sorted(options.items())))
        if key not in self._written:
            path = self._folder / str(len(self._written))
            write_tiny(path, network, **options)
            for file in path.glob("*.safetensors"):
                align(file)
            self._written[key] = path
        return self._written[key]


@dataclass(frozen=True)
class Inputs:
    """Sizes of one step's inputs, see `tiny_request`."""

    network: str = HUNYUAN
    frames: int = 2
    height: int = 8
    width: int = 8
    channels: int = 16
    text: int = 8
    valid: tuple[int, ...] | None = None
    """Text tokens that a mask leaves to each sample, HunyuanVideo only."""
    batch: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32
    others: Callable[[StepRequest], Mapping[str, Any]] | None = None
    """Arguments of the network in place of those that the request has, or beside them; None takes one away."""

    def make(self, label: str = "") -> StepRequest:
        """The request."""
        fields = set(self.__dataclass_fields__) - {"network", "others"}
        request = tiny_request(self.network, **{name: getattr(self, name) for name in fields}, label=label)
        if self.others is None:
            return request
        named = {**arguments(request), **self.others(request)}
        named.pop("return_dict")
        return request_of(named.pop("hidden_states"), named.pop("timestep"), label=label, **named)


def arguments(request: StepRequest) -> dict[str, Any]:
    """What the network is called with."""
    tensors = {"x": request.x, "timestep": request.timestep, **request.conditioning}
    named: dict[str, Any] = restore(request.arguments, tensors.__getitem__)["named"]
    return named


def stock(path: Path, request: StepRequest) -> Tensor:
    """What diffusers alone makes of a request in this process, as workers compute: by one thread, and with weights that
    need no gradients, which select other kernels."""
    network = transformer_class(read_config(str(path))["_class_name"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = network.from_pretrained(path, torch_dtype=request.x.dtype).eval().requires_grad_(False)
        return model(**arguments(request))[0]
    finally:
        torch.set_num_threads(threads)


def step(remote: RemoteModel, inputs: Inputs) -> Tensor:
    """The prediction for these inputs."""
    return remote.steps([inputs.make()])[0]


def row(request: StepRequest, i: int) -> StepRequest:
    """One sample of a request's batch."""
    rows = slice(i, i + 1)
    conditioning = {n: t[rows] if len(t) == len(request.x) else t for n, t in request.conditioning.items()}
    return replace(request, x=request.x[rows], timestep=request.timestep[rows], conditioning=conditioning)


def on(device: torch.device, request: StepRequest) -> StepRequest:
    """A request with its tensors on a device."""
    conditioning = {name: tensor.to(device) for name, tensor in request.conditioning.items()}
    return replace(request, x=request.x.to(device), timestep=request.timestep.to(device), conditioning=conditioning)


@dataclass(frozen=True)
class Model:
    """A model, the step it is asked for, and how it is loaded."""

    inputs: Inputs = field(default_factory=Inputs)
    options: dict[str, Any] = field(default_factory=dict)
    """Of `TinyModels.path`."""
    weight_dtype: torch.dtype | None = None

    def path(self, tiny_models: TinyModels) -> Path:
        return tiny_models.path(self.inputs.network, **self.options)


def recipe_of(path: Path, devices: str, weight_dtype: torch.dtype | None = None, **options: Any) -> Recipe:
    """`options` as in `SequenceParallelConfig`."""
    return recipe(str(path), SequenceParallelConfig(devices=on_ranks(devices), **options), weight_dtype)


@contextmanager
def loaded(
    group: WorkerGroup, path: Path, weight_dtype: torch.dtype | None = None, **options: Any
) -> Iterator[RemoteModel]:
    """The model on this group, for the time of the `with` block."""
    model = RemoteModel(recipe_of(path, group.layout.describe(), weight_dtype, **options), group=group)
    model.weights.ensure_loaded()
    try:
        yield model
    finally:
        model.weights.unload()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max|a − b| / max|b|."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()
