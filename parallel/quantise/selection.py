"""Which linear layers of a model become FP8. Told from names and shapes alone, so that the host knows as well."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch

from ..adapters.base import Adapter
from ..adapters.native import NativeTensors
from ..checkpoints.quantised import FP8
from ..checkpoints.source import Source
from ..errors import ConfigError
from .settings import DYNAMIC

_MULTIPLE = 16
"""Of both sides of a weight, for `torch._scaled_mm`."""


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a layer: it fits some of the dotted parts of its name, that follow each other.

    `img_mod` means `double_blocks.0.img_mod.lin`, `blocks.1` means `blocks.1.ffn.0` and not `blocks.10.ffn.0`; `*`,
    `?` and `[…]` are as in file names, and `*` does not stop at dots.
    """
    parts = name.split(".")
    return any(
        fnmatchcase(".".join(parts[i:j]), pattern) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """What becomes of the linear layers."""

    weights: dict[str, tuple[int, int]]
    """Parameters of the diffusers model to quantise → shape."""
    already: int
    skipped: int
    unfit: int
    saved: int
    """Bytes by which the weights become less."""

    @property
    def counts(self) -> dict[str, int]:
        """Of layers, by the names of `settings.FP8Report`; and `saved`."""
        layers = {"layers": len(self.weights), "already": self.already, "skipped": self.skipped, "unfit": self.unfit}
        return {**layers, "saved": self.saved}


def select(
    source: Source,
    adapter: Adapter,
    tensors: NativeTensors,
    *,
    scheme: str,
    skip: Sequence[str],
    storage: torch.dtype,
    compute: torch.dtype,
) -> Selection:
    """Decides for each linear layer.

    Args:
        source, adapter, tensors: the checkpoint.
        scheme: not `auto`.
        skip: patterns; the family's own are added.
        storage, compute: dtypes of the recipe. Weights that are stored in fp8, or are scaled fp8 in the file, are left
            so by `weight_only`, and keep their values under the others.

    Raises:
        ConfigError: a pattern means no layer.
    """
    layers = []
    for name, target, shape, fixed in _linear_layers(adapter, tensors):
        is_fp8 = f"{name}.weight" in source.scales or (storage in FP8 and not source.scales)
        stays = fixed or any(matches(name, pattern) for pattern in adapter.not_quantised)
        layers.append(LinearLayer(name, target, shape, 1 if is_fp8 else compute.itemsize, is_fp8=is_fp8, stays=stays))
    return select_layers(layers, scheme=scheme, skip=skip)


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """What decides about a layer."""

    name: str
    """The checkpoint's."""
    target: str
    """The model's."""
    shape: tuple[int, int]
    """Of its weight."""
    itemsize: int
    """Bytes in which each of its values is kept."""
    is_fp8: bool
    stays: bool
    """Embedders, modulations and the last layer."""


def select_layers(layers: Iterable[LinearLayer], *, scheme: str, skip: Sequence[str]) -> Selection:
    """As `select`, of layers that are known."""
    dynamic = scheme in DYNAMIC
    weights: dict[str, tuple[int, int]] = {}
    already = skipped = unfit = saved = 0
    used: set[str] = set()
    names: list[str] = []
    for layer in layers:
        names += {layer.name, layer.target}
        mine = {pattern for pattern in skip if matches(layer.name, pattern) or matches(layer.target, pattern)}
        used |= mine
        if layer.stays or mine:
            skipped += 1
        elif layer.is_fp8 and not dynamic:
            already += 1
        elif dynamic and any(side % _MULTIPLE for side in layer.shape):
            unfit += 1
        else:
            weights[f"{layer.target}.weight"] = layer.shape
            scales = 1 if scheme == "dynamic_tensorwise" else layer.shape[0]
            saved += prod(layer.shape) * (layer.itemsize - 1) - 4 * scales
    for pattern in skip:
        if pattern not in used:
            near = ", ".join(difflib.get_close_matches(pattern, sorted(set(names)), 3, 0))
            raise ConfigError(
                f"skip has the pattern {pattern!r}, which fits no linear layer of this model; some of its layers are"
                f" {near}"
            )
    return Selection(weights, already, skipped, unfit, saved)


def _linear_layers(adapter: Adapter, tensors: NativeTensors) -> Iterator[tuple[str, str, tuple[int, int], bool]]:
    """Layer of the checkpoint, layer of the diffusers model, shape of its weight, whether it has to stay as it is.

    A fused one comes several times.
    """
    for name, shape in tensors.shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        rows = torch.empty(shape[0], 0)
        for piece in tensors.pieces(name):
            target = piece.name.removesuffix(".weight")
            fixed = piece.name in adapter.full_precision or any(re.search(p, target) for p in adapter.read_directly)
            yield name.removesuffix(".weight"), target, (len(piece.take(rows)), shape[1]), fixed
