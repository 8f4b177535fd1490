"""Which linear layers of a model become FP8. Told from names and shapes alone, so that the host knows as well."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ..errors import ConfigError
from .settings import DYNAMIC, TENSORWISE

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
        scheme: not `auto`. Weights that are in fp8 already are left so by `weight_only`, and keep their values under
            the others.
        skip: patterns, see `matches`.

    Raises:
        ConfigError: a pattern means no layer.
    """
    dynamic = scheme in DYNAMIC
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
        elif layer.is_fp8 and not dynamic:
            already += 1
        elif dynamic and any(side % _MULTIPLE for side in layer.shape):
            unfit += 1
        else:
            weights[f"{layer.name}.weight"] = layer.shape
            scales = 1 if scheme == TENSORWISE else layer.shape[0]
            saved += prod(layer.shape) * (layer.itemsize - 1) - 4 * scales
    for pattern in skip:
        if pattern not in used:
            near = ", ".join(difflib.get_close_matches(pattern, sorted(set(names)), 3, 0))
            raise ConfigError(
                f"skip has the pattern {pattern!r}, which fits no linear layer of this model; some of its layers are"
                f" {near}"
            )
    return Selection(weights, already, skipped, unfit, saved)
