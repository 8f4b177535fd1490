"""Quantised single files: which tensors are scales of others, and what is refused by name.

ComfyUI's scaled fp8 comes in layouts that differ in names only. Old: a marker `scaled_fp8`, and for a layer's weight
`.scale_weight` and `.scale_input`. New: `.weight_scale`, `.input_scale` and `.comfy_quant`, which holds JSON as bytes;
or that JSON of all layers in the file's metadata. Input scales are for arithmetic in fp8 and have no use here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from .source import TensorInfo

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_SCALES = (".scale_weight", ".weight_scale")
_NOT_NEEDED = (".scale_input", ".input_scale")
_LAYER = ".comfy_quant"
_MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")

# Tensors that only these formats have; the first match counts.
_FOREIGN_FORMATS = {
    ".wscales": "SVDQuant (Nunchaku)",
    ".smooth_factor": "SVDQuant (Nunchaku)",
    ".qweight": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
}
_COMFYUI_FORMATS = {
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "asym_w4a8_int8",
    ".pre_quant_scale": "pre-scaled (ModelOpt AWQ)",
}


def separate(
    path: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tells the network's tensors from what only describes their quantisation.

    Args:
        path: for messages.
        tensors, metadata: of the file.
        read: reads a tensor; asked for the small `.comfy_quant` ones only.

    Returns:
        The network's tensors; weight → name of its scale, for those that have one.

    Raises:
        UnsupportedError: quantised in another way than fp8 with one scale per tensor.
        CheckpointError: the scale or the description of a layer is missing or damaged.
    """
    if what := _format(tensors, _FOREIGN_FORMATS | _COMFYUI_FORMATS):
        raise _refusal(path, what)
    layers = _layers(path, tensors, metadata, read)
    for layer, description in layers.items():
        if (what := str(description.get("format"))) not in _FORMATS:
            raise _refusal(path, what, layer)
    scales: dict[str, str] = {}
    for name, info in tensors.items():
        for suffix in _SCALES:
            if name.endswith(suffix):
                weight = name.removesuffix(suffix) + ".weight"
                _check(path, weight, tensors.get(weight), info)
                scales[weight] = name
    for layer in layers:
        if f"{layer}.weight" in tensors and f"{layer}.weight" not in scales:
            raise CheckpointError(f"{path}: layer {layer!r} is described as scaled fp8, but has no scale")
    aside = (*_SCALES, *_NOT_NEEDED, _LAYER)
    return {n: info for n, info in tensors.items() if n != _MARKER and not n.endswith(aside)}, scales


def foreign_format(names: Collection[str]) -> str:
    """What a file is quantised as, if ComfyUI itself does not know it; else nothing."""
    return _format(names, _FOREIGN_FORMATS)


def _format(names: Collection[str], formats: Mapping[str, str]) -> str:
    found = (what for suffix, what in formats.items() if any(name.endswith(suffix) for name in names))
    return next(found, "")


def _layers(
    path: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """What the file says of each quantised layer."""
    try:
        found = dict(json.loads(metadata[_METADATA])["layers"]) if _METADATA in metadata else {}
        for name in tensors:
            if name.endswith(_LAYER):
                found[name.removesuffix(_LAYER)] = json.loads(read(name).numpy().tobytes())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the description of its quantisation is damaged ({error})") from error
    return found


def _check(path: str, weight: str, info: TensorInfo | None, scale: TensorInfo) -> None:
    """Refuses a scale that is not the one scale of an fp8 weight."""
    if info is None:
        raise CheckpointError(f"{path}: there is a scale for {weight!r}, but not that tensor")
    if info.dtype not in FP8:
        raise _refusal(path, f"scaled {str(info.dtype).removeprefix('torch.')}", weight)
    if torch.Size(scale.shape).numel() != 1:
        raise _refusal(path, f"fp8 with scales of shape {list(scale.shape)} for one tensor", weight)


def _refusal(path: str, what: str, where: str = "") -> UnsupportedError:
    at = f" (at {where!r})" if where else ""
    return UnsupportedError(
        f"{path} is quantised as {what}{at}, which is not supported yet; use the bf16, fp16, fp8 or scaled-fp8 file of"
        " the model"
    )
