"""Builds a network of one of ComfyUI's classes without weights, and runs forward passes of it on small inputs."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from torch import nn

from ..errors import ConfigError
from ..plans.recording import Call, record
from .detection import detect

Shape = Sequence[int]

LATENTS = {4: ((10, 14), (22, 26)), 5: ((3, 6, 10), (5, 10, 14)), 3: ((35,), (75,))}
"""Maps the number of dims of a latent to (frames,) rows and columns of a small one and of a larger one."""
TEXT = "context"
"""Name of the argument that is a text."""
TEXTS = (7, 71)
"""Numbers of tokens of a text, and of a longer one."""
RUNS_ON_CPU = 2**27
"""Maximum number of parameters of a model that runs on the CPU if it cannot run on the meta device."""


def network_of_class(name: str, config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Builds a network of a class anywhere in `comfy.ldm`, by its constructor, from `config`.

    Raises:
        ConfigError: there is no such class, or its constructor requires more.
    """
    kind = _class_named(name)
    settings = {"device": device, "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    parameters = inspect.signature(kind.__init__).parameters
    try:
        network: nn.Module = kind(**config, **{key: value for key, value in settings.items() if key in parameters})
    except Exception as error:
        known = [key for key in parameters if key not in ("self", *settings)]
        raise ConfigError(
            f"config is {dict(config)!r}, of which {name} cannot be made ({type(error).__name__}: {error});"
            f" give its constructor's arguments as JSON: {', '.join(known)}"
        ) from error
    return _zeros(network)


def network_of_file(path: str, device: torch.device) -> nn.Module:
    """Builds the network that ComfyUI would build for a file, without the file's weights."""
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
        if re.search(rf"^class {re.escape(name)}\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            module = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
            return getattr(importlib.import_module(module), name)
    raise ConfigError(
        f"the class is {name!r}, which is not in {folder / 'ldm'}; give the name of a network's class, as Flux, or a"
        " safetensors file"
    )


def passes(
    network: nn.Module, inputs: Mapping[str, Any], larger: Mapping[str, Any], times: int = 1
) -> list[dict[str, Call]]:
    """Records three forward passes: with a small latent, a larger one, and a longer text.

    A number that equals the length of the text changes with the text.

    Args:
        network: on the meta device, or on a CPU.
        inputs: arguments of its `forward` by name, as read from JSON: a list of whole numbers is the shape of a tensor,
            a list of lists is a list of tensors, anything else is the value itself. For latent, timestep and text,
            candidates are tried if they are not passed.
        larger: replaces inputs in the pass with the larger latent. Without it, rows and columns that are the latent's
            or a multiple, and frames before them, change with the latent.
        times: factor of the rows and columns of `LATENTS`, for latents that are not passed.

    Raises:
        ConfigError: an input is unknown or missing, or no candidate fits.
    """
    latent, timestep = list(inspect.signature(type(network).forward).parameters)[1:3]
    _check_names(network, inputs, larger, (latent, timestep, TEXT))
    device = next(network.parameters()).device

    def run(small: Shape, shape: Shape, text: Shape) -> dict[str, Call]:
        changed = larger if shape != small else {}
        made = {
            name: _made(value, small, small if name in changed else shape, text[-2], device)
            for name, value in {**inputs, **changed}.items()
        }
        made.setdefault(timestep, torch.full((shape[0],), 0.6, device=device))
        sized = {name: torch.zeros(tuple(size), device=device) for name, size in ((latent, shape), (TEXT, text))}
        with torch.no_grad():
            return record(network, {**made, **sized})

    failed = ""
    shapes = [inputs[latent]] if latent in inputs else _latents(network, times)
    widths = [inputs[TEXT][-1]] if TEXT in inputs else _widths(network)
    for small, width in itertools.product(shapes, widths):
        batch = inputs[TEXT][:-2] if TEXT in inputs else small[:1]
        short, long = ([*batch, tokens, width] for tokens in TEXTS)
        try:
            first = run(small, small, short)
        except NotImplementedError:
            raise
        except Exception as error:
            failed = f"{latent} {list(small)}, {TEXT} of width {width}: {type(error).__name__}: {error}"
            continue
        sizes = [3 * size for size in small[2:]] if latent in inputs else _sized(LATENTS[len(small)][1], times)
        grown = larger.get(latent, [*small[:2], *sizes])
        return [first, run(small, grown, short), run(small, small, long)]
    raise ConfigError(
        f"no input was found that {type(network).__name__}.forward takes; the last one tried: {failed}. Give"
        f" inputs as --input NAME=JSON, e.g. --input {latent}=[1,16,10,14] --input {TEXT}=[1,7,4096]"
    )


def _check_names(
    network: nn.Module, inputs: Mapping[str, Any], larger: Mapping[str, Any], tried: tuple[str, ...]
) -> None:
    takes = dict(list(inspect.signature(type(network).forward).parameters.items())[1:])
    anything = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    if unknown := [name for name in [*inputs, *larger] if name not in takes and not anything]:
        raise ConfigError(
            f"input is {', '.join(unknown)}, which {type(network).__name__}.forward has not; it has: {', '.join(takes)}"
        )
    needed = [name for name, each in takes.items() if each.default is each.empty and name not in ("args", "kwargs")]
    if lacking := [name for name in needed if name not in (*inputs, *tried)]:
        raise ConfigError(
            f"{type(network).__name__}.forward needs {', '.join(lacking)}, too; give each as --input NAME=JSON:"
            " a list of whole numbers is a tensor's shape"
        )


def _latents(network: nn.Module, times: int) -> Iterator[Shape]:
    """Yields shapes to try, with channels from attributes and a convolution, and common ones."""
    attributes = {**vars(network), **vars(getattr(network, "params", network))}
    channels = [
        value
        for name, value in attributes.items()
        if isinstance(value, int) and 1 < value <= 512 and ("channels" in name or name.startswith("in_"))
    ]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    channels += [module.in_channels for module in convolutions[:1]]
    likely = [4, 5, 3] if any(isinstance(module, nn.Conv2d) for module in convolutions) else [5, 4, 3]
    for dims, count in itertools.product(likely, dict.fromkeys([*channels, 16, 4, 128])):
        yield [1, count, *_sized(LATENTS[dims][0], times)]


def _sized(sizes: Shape, times: int) -> list[int]:
    return [*sizes[:-2], *(times * size for size in sizes[-2:])]


def _widths(network: nn.Module) -> list[int]:
    """Returns widths of a text to try: the input widths of linear layers and norms."""
    widths: dict[int, None] = {}
    for module in network.modules():
        if isinstance(module, nn.Linear):
            widths[module.in_features] = None
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            widths[math.prod(module.normalized_shape)] = None
    return list(widths)


def _made(value: Any, small: Shape, latent: Shape, text: int, device: torch.device) -> Any:
    """Builds an input from JSON for another latent and this number of text tokens, see `passes`."""
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        return torch.zeros(_following(value, small, latent), device=device)
    if isinstance(value, list):
        return [_made(each, small, latent, text, device) for each in value]
    if isinstance(value, dict):
        return {name: _made(each, small, latent, text, device) for name, each in value.items()}
    return text if value == TEXTS[0] and not isinstance(value, bool) else value


def _following(shape: list[int], small: Shape, latent: Shape) -> list[int]:
    """Returns the shape for another latent, if its rows and columns are the same multiple of the small latent's; else
    the shape itself."""
    if len(shape) < len(small) or shape[-2] % small[-2] or shape[-2] // small[-2] * small[-1] != shape[-1]:
        return shape
    times = shape[-1] // small[-1]
    frames = latent[2] if len(small) == 5 and shape[-3] == small[2] else shape[-3]
    return [*shape[:-3], frames, times * latent[-2], times * latent[-1]]
