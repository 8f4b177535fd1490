"""Remark on whether the devices of a decode give the same bits as one device."""

from __future__ import annotations

from collections.abc import Sequence


def unequal(titles: Sequence[str]) -> str:
    """Returns a remark if the devices are of different models, which round a tile differently; otherwise an empty text.

    Args:
        titles: model name of each worker's device, e.g. `NVIDIA GeForce RTX 4090`.
    """
    models = sorted(set(titles))
    if len(models) < 2:
        return ""
    return f"; not bit for bit as on one device, as these differ: {', '.join(models)}"
