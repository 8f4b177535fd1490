"""A network of a class of ComfyUI's, without weights, and forward passes of it on small inputs."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..plans.recording import Recording, record
from .detection import detect

LATENTS = {4: ((10, 14), (22, 26)), 5: ((3, 6, 10), (5, 10, 14)), 3: ((35,), (75,))}
"""Dims of a latent → (frames,) rows and columns of a small one and a larger one."""
TEXTS = (7, 71)
"""Tokens of a text, and of a longer one."""
RUNS_ON_CPU = 2**27
"""Parameters up to which a model that cannot run on the meta device runs on the CPU."""


def network_of_class(name: str, config: Mapping[str, Any] | None, device: torch.device) -> nn.Module:
    """A network of a class anywhere in `comfy.ldm`, as its constructor makes it of `config`.

    Raises:
        ConfigError: no such class, or its constructor asks for more.
    """
    kind = _class_named(name)
    settings = {"device": device, "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    parameters = inspect.signature(kind.__init__).parameters
    given = {**(config or {}), **{key: value for key, value in settings.items() if key in parameters}}
    try:
        network: nn.Module = kind(**given)
    except Exception as error:
        known = [key for key in parameters if key not in ("self", *settings)]
        raise ConfigError(
            f"config is {dict(config or {})!r}, of which {name} cannot be made ({type(error).__name__}: {error});"
            f" give its constructor's arguments as JSON: {', '.join(known)}"
        ) from error
    return _zeros(network)


def network_of_file(path: str, device: torch.device) -> nn.Module:
    """The network that ComfyUI would make of a file, without the file's weights."""
    detected = detect(path, torch.float32, torch.device("cpu"))
    detected.model_config.set_inference_dtype(torch.float32, None)
    network: nn.Module = detected.model_config.get_model({}, "", device=device).diffusion_model
    return _zeros(network)


def _zeros(network: nn.Module) -> nn.Module:
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.requires_grad_(False).zero_()
    return network


def _class_named(name: str) -> Any:
    folder = Path(inspect.getfile(comfy.ops)).parent
    for file in sorted((folder / "ldm").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if f"class {name}(" not in text:
            continue
        if any(isinstance(node, ast.ClassDef) and node.name == name for node in ast.parse(text).body):
            module = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
            return getattr(importlib.import_module(module), name)
    raise ConfigError(
        f"the class is {name!r}, which is not in {folder / 'ldm'}; give the name of a network's class, as Flux, or a"
        " safetensors file"
    )


class Trial:
    """Forward passes of a network.

    Args:
        network: on the meta device, or on a CPU.
        inputs: what its forward is given by name, as read from JSON: a list of whole numbers is the shape of a tensor,
            a list of lists is a list of tensors, anything else is itself. Of what is not given, the latent, the
            timestep and the text are tried.
        larger: what takes their place in the pass with the larger latent. Without it, rows and columns that are the
            latent's or a multiple, and frames before them, change with it.
        times: rows and columns of latents that are not given, in multiples of `LATENTS`.

    A number that is the text's length changes with the text.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Mapping[str, Any] | None = None,
        larger: Mapping[str, Any] | None = None,
        times: int = 1,
    ):
        self._times = times
        self._network = network
        self._inputs, self._larger = dict(inputs or {}), dict(larger or {})
        self._device = next(iter(network.parameters())).device
        names = list(inspect.signature(type(network).forward).parameters)[1:]
        self._latent, self._timestep = names[0], names[1]
        self._text = "context"
        takes = inspect.signature(type(network).forward).parameters
        anything = any(each.kind is each.VAR_KEYWORD for each in takes.values())
        if unknown := [name for name in [*self._inputs, *self._larger] if name not in takes and not anything]:
            raise ConfigError(
                f"input is {', '.join(unknown)}, which {type(network).__name__}.forward has not; it has:"
                f" {', '.join(names)}"
            )
        needed = [name for name in names if takes[name].default is takes[name].empty]
        if lacking := [
            name for name in needed if name not in {*self._inputs, *names[:2], self._text, "args", "kwargs"}
        ]:
            raise ConfigError(
                f"{type(network).__name__}.forward needs {', '.join(lacking)}, too; give each as --input NAME=JSON:"
                " a list of whole numbers is a tensor's shape"
            )

    def record(self) -> list[Recording]:
        """Three passes: with a small latent, a larger one, and a longer text.

        Raises:
            ConfigError: none of the tried inputs fits.
        """
        failed = ""
        for shape, width in itertools.product(self._latents(), self._widths()):
            try:
                first = self._pass(shape, shape, width, TEXTS[0])
            except NotImplementedError:
                raise
            except Exception as error:
                failed = f"{self._latent} {list(shape)}, {self._text} of width {width}: {type(error).__name__}: {error}"
                continue
            larger = (*shape[:2], *self._sized(LATENTS[len(shape)][1]))
            if self._latent in self._inputs:
                larger = (*shape[:2], *(3 * size for size in shape[2:]))
            larger = tuple(self._larger.get(self._latent, larger))
            return [first, self._pass(shape, larger, width, TEXTS[0]), self._pass(shape, shape, width, TEXTS[1])]
        raise ConfigError(
            f"no input was found that {type(self._network).__name__}.forward takes; the last one tried: {failed}. Give"
            f" inputs as --input NAME=JSON, e.g. --input {self._latent}=[1,16,10,14] --input {self._text}=[1,7,4096]"
        )

    def _latents(self) -> Iterator[tuple[int, ...]]:
        """Shapes to try: channels are what an attribute or a convolution says."""
        if (given := self._inputs.get(self._latent)) is not None:
            yield tuple(given)
            return
        holders = [self._network, getattr(self._network, "params", None)]
        channels: dict[int, None] = {}
        for holder in filter(None, holders):
            for name, value in vars(holder).items():
                if isinstance(value, int) and 1 < value <= 512 and ("channels" in name or name.startswith("in_")):
                    channels[value] = None
        for module in self._network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                channels[module.in_channels] = None
                break
        sizes = [4, 5] if any(isinstance(module, nn.Conv2d) for module in self._network.modules()) else [5, 4]
        for dims, count in itertools.product([*sizes, 3], [*channels, 16, 4, 128]):
            yield (1, count, *self._sized(LATENTS[dims][0]))

    def _sized(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-2], *(self._times * size for size in sizes[-2:]))

    def _widths(self) -> Iterator[int]:
        """Of the text: what a linear layer or a norm takes."""
        if (given := self._inputs.get(self._text)) is not None:
            yield given[-1]
            return
        widths: dict[int, None] = {}
        for module in self._network.modules():
            if isinstance(module, nn.Linear):
                widths[module.in_features] = None
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                widths[math.prod(module.normalized_shape)] = None
        yield from widths

    def _pass(self, small: tuple[int, ...], latent: tuple[int, ...], width: int, length: int) -> Recording:
        changed = {} if latent == small else self._larger
        arguments = {
            name: self._made(changed.get(name, value), small, small if name in changed else latent, length)
            for name, value in self._inputs.items()
        }
        arguments[self._latent] = self._tensor(latent)
        arguments.setdefault(self._timestep, torch.full((latent[0],), 0.6, device=self._device))
        arguments[self._text] = self._tensor((*self._inputs.get(self._text, (*latent[:1], 0, 0))[:-2], length, width))
        network = self._network
        with torch.no_grad():
            return record(network, lambda options: network(**arguments, transformer_options=options))

    def _made(self, value: Any, small: tuple[int, ...], latent: tuple[int, ...], length: int) -> Any:
        if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
            return self._tensor(_following(value, small, latent))
        if isinstance(value, list):
            return [self._made(each, small, latent, length) for each in value]
        if isinstance(value, dict):
            return {name: self._made(each, small, latent, length) for name, each in value.items()}
        return length if value == TEXTS[0] and not isinstance(value, bool) else value

    def _tensor(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), device=self._device)


def _following(shape: list[int], small: tuple[int, ...], latent: tuple[int, ...]) -> list[int]:
    """A shape whose rows and columns are as many times the small latent's, for another latent."""
    if len(shape) < len(small) or shape[-2] % small[-2] or shape[-2] // small[-2] * small[-1] != shape[-1]:
        return shape
    times = shape[-1] // small[-1]
    frames = [latent[2]] if len(small) == 5 and shape[-3] == small[2] else [shape[-3]]
    return [*shape[:-3], *frames, times * latent[-2], times * latent[-1]]
