"""Selects a model's linear layers to quantise, by names, shapes and dtypes alone, so that the host can do so too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ..errors import ConfigError
from .settings import DYNAMIC, TENSORWISE, WEIGHT_ONLY

_MULTIPLES = dict.fromkeys(DYNAMIC, (16, 16)) | {"int8_convrot": (1, 16), "mxfp8": (32, 32), "nvfp4": (16, 16)}
"""Maps schemes to the numbers that must divide a weight's rows and columns, for `torch._scaled_mm` and comfy-kitchen's
kernels."""


def matches(name: str, pattern: str) -> bool:
    """Returns True if a pattern matches consecutive dotted parts of a layer's name.

    `img_mod` matches `double_blocks.0.img_mod.lin`, `blocks.1` matches `blocks.1.ffn.0` but not `blocks.10.ffn.0`; `*`,
    `?` and `[…]` are as in file names, and `*` also matches dots.
    """
    parts = name.split(".")
    return any(
        fnmatchcase(".".join(parts[i:j]), pattern) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """Linear layers to quantise, and counts of the others."""

    weights: dict[str, tuple[int, int]]
    """Maps the parameters to quantise to their shapes."""
    already: int
    skipped: int
    unfit: int
    saved: int
    """Bytes by which the weights shrink."""

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of layers, named as in `settings.FP8Report`, and `saved`."""
        layers = {"layers": len(self.weights), "already": self.already, "skipped": self.skipped, "unfit": self.unfit}
        return {**layers, "saved": self.saved}


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """Properties of a linear layer that decide whether it is quantised."""

    name: str
    shape: tuple[int, int]
    """Shape of its weight."""
    itemsize: int
    """Bytes per stored value of its weight."""
    is_fp8: bool
    stays: bool
    """True for embedders, modulations and the last layer, which are never quantised."""


def select_layers(layers: Iterable[LinearLayer], *, scheme: str, skip: Sequence[str]) -> Selection:
    """Selects the linear layers to quantise.

    Args:
        layers: linear layers of the network.
        scheme: any scheme but `auto`. Weights that are in fp8 already are left as they are by `weight_only`, keep their
            values under the other FP8 schemes, and are requantised under comfy-kitchen's.
        skip: patterns of layers to leave as they are, see `matches`.

    Raises:
        ConfigError: a pattern matches no layer.
    """
    multiples = _MULTIPLES.get(scheme, (1, 1))
    weights: dict[str, tuple[int, int]] = {}
    already = skipped = unfit = saved = 0
    used: set[str] = set()
    names: list[str] = []
    for layer in layers:
        names.append(layer.name)
        mine = {pattern for pattern in skip if matches(layer.name, pattern)}
        used |= mine
        if layer.stays or mine:
            skipped += 1
        elif layer.is_fp8 and scheme == WEIGHT_ONLY:
            already += 1
        elif any(side % multiple for side, multiple in zip(layer.shape, multiples, strict=True)):
            unfit += 1
        else:
            weights[f"{layer.name}.weight"] = layer.shape
            saved += prod(layer.shape) * layer.itemsize - _stored_bytes(scheme, *layer.shape)
    for pattern in skip:
        if pattern not in used:
            near = ", ".join(difflib.get_close_matches(pattern, sorted(set(names)), 3, 0))
            raise ConfigError(
                f"skip has the pattern {pattern!r}, which fits no linear layer of this model; some of its layers are"
                f" {near}"
            )
    return Selection(weights, already, skipped, unfit, saved)


def _stored_bytes(scheme: str, rows: int, columns: int) -> int:
    """Returns the bytes of a quantised weight and its scales."""
    if scheme in _BLOCKS:  # scales of blocks of columns, in tiles of 128 rows and 4 blocks
        bits, block, more = _BLOCKS[scheme]
        return rows * columns * bits // 8 + -(-rows // 128) * 128 * (-(-columns // (4 * block)) * 4) + more
    return rows * columns + 4 * (1 if scheme == TENSORWISE else rows)


_BLOCKS = {"mxfp8": (8, 32, 0), "nvfp4": (4, 16, 4)}
"""Maps schemes to bits per value, values per block, and bytes of a scale for the whole weight."""
