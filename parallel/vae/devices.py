"""What the devices of a decode say of its bits."""

from __future__ import annotations

from collections.abc import Sequence


def unequal(titles: Sequence[str]) -> str:
    """A remark where devices are of several models, empty where they are of one: each rounds a tile in its own way.

    Args:
        titles: the model of each worker's device, e.g. `NVIDIA GeForce RTX 4090`.
    """
    models = sorted(set(titles))
    if len(models) < 2:
        return ""
    return f"; not bit for bit as on one device, as these differ: {', '.join(models)}"
