"""GGUF files, handled by the code of the pack ComfyUI-GGUF: its reader, its layers, its handling of LoRAs.

The pack's tensors are bytes that a layer dequantises each time it computes. ComfyUI's process uses the modules of the
pack that are already loaded; a worker imports the same files, without the pack's nodes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError, UnsupportedError
from . import gguf_header

SUFFIX = ".gguf"
PACK = "ComfyUI-GGUF"
LOADER = "UnetLoaderGGUF"
"""Class name of its node *Unet Loader (GGUF)*."""
_ALONE = "sequence_parallel_gguf"
"""Module name of the pack in a worker, where ComfyUI has not loaded it."""
_FUNCTIONS = {"swap_scale_shift": comfy.utils.swap_scale_shift}
"""Functions that ComfyUI's LoRA names can apply to a patch, for layers that other libraries store the other way
round."""


def installed(nodes: Mapping[str, type]) -> str:
    """Returns the pack's folder if ComfyUI has loaded it; else an empty string.

    Args:
        nodes: ComfyUI's `NODE_CLASS_MAPPINGS`.
    """
    name = getattr(nodes.get(LOADER), "__module__", "").rpartition(".")[0]
    parts = [sys.modules.get(f"{name}.{part}") for part in ("loader", "ops")]
    has = [hasattr(part, needed) for part, needed in zip(parts, ("gguf_sd_loader", "GGMLOps"), strict=True)]
    return str(Path(sys.modules[name].__file__ or "").parent) if all(has) else ""


def refusal(path: str) -> UnsupportedError:
    """Returns the error for a GGUF file without the pack."""
    return UnsupportedError(
        f"{path} is a GGUF file, which is read by the pack {PACK} (city96/{PACK}, the node Unet Loader (GGUF)); it is"
        " not installed here, or did not load. Install it, or use the model's safetensors file"
    )


def read(path: str, folder: str) -> dict[str, Tensor]:
    """Returns a file's tensors, mapped: quantised ones of the pack's class, with the shape of their values, others
    plain.

    Args:
        folder: folder of the pack; empty if there is none.

    Raises:
        UnsupportedError: there is no pack.
        CheckpointError: the file is damaged, or the pack cannot read it.
    """
    if not folder:
        raise refusal(path)
    gguf_header.check(path)
    module, kind = _module(folder, "dequant"), _portable(_module(folder, "ops").GGMLTensor)
    try:
        found = _module(folder, "loader").gguf_sd_loader(path)
    except Exception as error:  # on a damaged file, its reader may raise anything
        raise CheckpointError(
            f"{path} cannot be read by {PACK} ({type(error).__name__}: {error}); the file may be damaged or incomplete"
        ) from error
    _check_places(path, found)
    return {
        name: kind(tensor, tensor_type=tensor.tensor_type, tensor_shape=tensor.shape)
        if module.is_quantized(tensor)
        else tensor.as_subclass(torch.Tensor)
        for name, tensor in found.items()
    }


def _check_places(path: str, found: Mapping[str, Any]) -> None:
    """Checks what the pack trusts without a check: that no tensors share bytes, and that declared shapes fit the bytes.

    Raises:
        CheckpointError: naming a tensor.
    """
    sizes = importlib.import_module("gguf").GGML_QUANT_SIZES
    end, before = 0, ""
    for name, tensor in sorted(found.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end and tensor.nbytes:
            raise CheckpointError(f"{path} is damaged: the tensors {before!r} and {name!r} overlap")
        end, before = tensor.data_ptr() + tensor.nbytes, name
        shape = list(tensor.tensor_shape)
        values, nbytes = sizes[tensor.tensor_type]
        if tensor.dtype is torch.uint8 and (
            min(shape, default=0) < 0 or prod(shape) * nbytes // values != tensor.nbytes
        ):
            raise CheckpointError(
                f"{path} is damaged: {name!r} has {tensor.nbytes} bytes, and cannot have the shape {shape}"
            )


def operations(folder: str) -> Any:
    """Returns the pack's layers in the form that ComfyUI's models take."""
    return _module(folder, "ops").GGMLOps()


def quantised_as(state: Iterable[Any]) -> str:
    """Returns the formats of a file as text for the user."""
    kinds = {tensor.tensor_type.name for tensor in state if is_traceable_wrapper_subclass(tensor)}  # type: ignore[attr-defined]
    return "GGUF" + (f" {', '.join(sorted(kinds))}" if kinds else "")


def check(path: str, folder: str, network: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Refuses quantised tensors of modules that are not layers of the pack: nothing would dequantise them.

    Raises:
        CheckpointError: naming one.
    """
    layer, modules = _module(folder, "ops").GGMLLayer, dict(network.named_modules())
    for name, tensor in tensors.items():
        module = modules.get(name.rpartition(".")[0])  # None for a tensor that the network has no place for
        if is_traceable_wrapper_subclass(tensor) and module is not None and not isinstance(module, layer):
            raise CheckpointError(f"{path}: {name} is quantised, and is of no layer that {PACK} restores")


def plain_patches(key: str, patches: Sequence[tuple[Any, ...]], shape: torch.Size) -> list[dict[str, Any]]:
    """Returns the patches of one weight as a nest of tensors and plain data.

    Args:
        key: the weight's name, for messages.
        patches: entries of `ModelPatcher.patches`.
        shape: shape of the weight.

    Raises:
        UnsupportedError: a patch changes the weight's shape, or does something that no worker supports.
    """
    found = []
    for strength, value, strength_model, offset, function in patches:
        adapter = isinstance(value, comfy.weight_adapter.WeightAdapterBase)
        name = None if function is None else getattr(function, "__name__", repr(function))
        if function is not None and _FUNCTIONS.get(str(name)) is not function:
            raise UnsupportedError(f"a LoRA that changes {key} by {name} cannot be used with a GGUF file; remove it")
        if (other := _other_shape(value, shape)) is not None:
            raise UnsupportedError(
                f"a LoRA that gives {key} the shape {other} instead of {list(shape)} (as control LoRAs do) cannot be"
                " used with Load Diffusion Model (SP)"
            )
        found.append(
            {
                "strength": float(strength),
                "adapter": value.name if adapter else None,
                "value": value.weights if adapter else value,
                "strength_model": float(strength_model),
                "offset": offset,
                "function": name,
            }
        )
    return found


def _other_shape(value: Any, shape: torch.Size) -> list[int] | None:
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        reshape = value.weights[5]
        return None if reshape is None or list(reshape) == list(shape) else list(reshape)
    pads = isinstance(value, tuple) and value[0] == "diff" and len(value[1]) > 1 and value[1][1]["pad_weight"]
    return list(value[1][0].shape) if pads and value[1][0].shape != shape else None


def patches_of(nest: Sequence[Mapping[str, Any]], key: str) -> list[tuple[list[tuple[Any, ...]], str]]:
    """Returns the patches of a weight in the form that the pack's layers expect: the reverse of `plain_patches`.

    Args:
        nest: result of `plain_patches`, with tensors on the layer's device.
        key: the weight's name.
    """
    adapters = {adapter.name: adapter for adapter in comfy.weight_adapter.adapters}
    patches = [
        (
            patch["strength"],
            adapters[patch["adapter"]](set(), patch["value"]) if patch["adapter"] else patch["value"],
            patch["strength_model"],
            patch["offset"],
            _FUNCTIONS[patch["function"]] if patch["function"] else None,
        )
        for patch in nest
    ]
    return [(patches, key)] if patches else []


@cache
def _portable(kind: type[Tensor]) -> Any:
    """Returns a subclass of the pack's tensor that flattens and unflattens like PyTorch's own wrapper subclasses."""

    class GGUFTensor(kind):  # type: ignore[misc, valid-type]
        @property
        def raw(self) -> Tensor:
            return self.as_subclass(Tensor)

        def __tensor_flatten__(self) -> tuple[list[str], Any]:
            return ["raw"], (self.tensor_type, self.tensor_shape)

        @staticmethod
        def __tensor_unflatten__(inner: Mapping[str, Tensor], told: Any, size: Any, stride: Any) -> Tensor:
            return GGUFTensor(inner["raw"], tensor_type=told[0], tensor_shape=told[1])

    return GGUFTensor


def _module(folder: str, part: str) -> Any:
    """Returns a module of the pack, the one that ComfyUI has loaded if it has."""
    loaded = (
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) == str(Path(folder) / "__init__.py")
    )
    package = next(loaded, _ALONE)
    if package == _ALONE and _ALONE not in sys.modules:
        alone = ModuleType(_ALONE)  # without its `__init__`, which makes nodes
        alone.__path__ = [folder]
        sys.modules[_ALONE] = alone
    return importlib.import_module(f"{package}.{part}")
