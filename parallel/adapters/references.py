"""Reference pictures among the inputs, and where they lie on the position embedding's rows and columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .base import unpack_text

PREFIX = "ref_latents."
"""Begins the names of the references: `ref_latents.0` and so on."""

Size = tuple[int, int]
"""Height and width, or row and column, in the latent's elements."""


def references_of(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The references in their order."""
    count = sum(name.startswith(PREFIX) for name in inputs)
    return [inputs[f"{PREFIX}{i}"] for i in range(count)]


def method_of(inputs: Mapping[str, Tensor]) -> str:
    """How the references are to be placed; empty where the conditioning does not say."""
    chosen = inputs.get("ref_latents_method")
    return "" if chosen is None else unpack_text(chosen)


def beside(sizes: Iterable[Size]) -> list[Size]:
    """Places for the method `offset`: each below or right of those before it, whichever keeps the whole smaller."""
    places = []
    below = right = 0
    for height, width in sizes:
        place = (0, right) if height + below > width + right else (below, 0)
        below, right = max(below, place[0] + height), max(right, place[1] + width)
        places.append(place)
    return places


def diagonal(sizes: Iterable[Size], corner: Size) -> list[Size]:
    """Places for the method `uxo`: down the diagonal from the picture's corner."""
    places = []
    for height, width in sizes:
        places.append(corner)
        corner = corner[0] + height, corner[1] + width
    return places
