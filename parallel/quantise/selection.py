"""Which linear layers of a model are quantised. Told from names and shapes alone, so that the host knows as well."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ..errors import ConfigError
from .settings import DYNAMIC, TENSORWISE, WEIGHT_ONLY

_MULTIPLES = dict.fromkeys(DYNAMIC, (16, 16)) | {"int8_convrot": (1, 16), "mxfp8": (32, 32), "nvfp4": (16, 16)}
"""Scheme → of which numbers the rows and columns of a weight are multiples, for `torch._scaled_mm` and comfy-kitchen's
kernels."""


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
    """Parameters to quantise → shape."""
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


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """What decides about a layer."""

    name: str
    shape: tuple[int, int]
    """Of its weight."""
    itemsize: int
    """Bytes in which each of its values is kept."""
    is_fp8: bool
    stays: bool
    """Embedders, modulations and the last layer."""


def select_layers(layers: Iterable[LinearLayer], *, scheme: str, skip: Sequence[str]) -> Selection:
    """Decides for each linear layer.

    Args:
        layers: of the network.
        scheme: not `auto`. Weights that are in fp8 already are left so by `weight_only`, keep their values under the
            other schemes of FP8, and are quantised anew under comfy-kitchen's.
        skip: patterns, see `matches`.

    Raises:
        ConfigError: a pattern means no layer.
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
    """Of a weight and its scales."""
    if scheme in _BLOCKS:  # scales of blocks of columns, in tiles of 128 rows and 4 blocks
        bits, block, more = _BLOCKS[scheme]
        return rows * columns * bits // 8 + -(-rows // 128) * 128 * (-(-columns // (4 * block)) * 4) + more
    return rows * columns + 4 * (1 if scheme == TENSORWISE else rows)


_BLOCKS = {"mxfp8": (8, 32, 0), "nvfp4": (4, 16, 4)}
"""Scheme → bits of a value, values of a block, bytes of scales for the whole weight."""
