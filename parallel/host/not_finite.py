"""Builds the error for a prediction that is not finite (NaN or infinite)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import NotFiniteError
from ..wire.messages import NotFinite
from ..wire.typed import from_plain
from . import status
from .process import WorkerProcess

_OVERFLOW = (
    "Most often a value was too large for float16 (above 65504): choose another weight_dtype, or start ComfyUI with"
    " --bf16-unet or --fp32-unet. Other causes: a LoRA of another model, a LoRA with a large strength, a damaged file"
)


def not_finite(workers: Sequence[WorkerProcess], found: Sequence[Mapping[str, Any]], steps: str = "") -> NotFiniteError:
    """Builds the error and reports it to the status listeners.

    Args:
        workers: the worker processes, by rank.
        found: finding of each rank from the second run of the step (`wire.messages.NotFinite`).
        steps: number of steps done before, as "3 of 20"; by default taken from the running sampling in `status`.
    """
    places = [from_plain(NotFinite, dict(each)) for each in found]
    rank, first = min(enumerate(places), key=lambda entry: entry[1].place)
    who = f"on worker rank {rank} ({workers[rank].device.name}, pid {workers[rank].process.pid})"
    sampling = status.sampling()
    if not steps and sampling is not None and sampling.running:
        steps = f"{sampling.step} of {sampling.steps}"
    after = f"after {steps} steps " if steps else ""
    text = f"{after}the model's prediction has values that are not finite (NaN or infinite)"
    if first.place < 0:
        text += f", already in the model's input {first.name!r}. Look at the node that makes it, e.g. the text encoder"
    elif all(place.finite for place in places):
        text += (
            ". A second run, without a cache between steps and without compiled blocks, gave finite values: remove"
            " Torch Compile (SP) or the node of the cache"
        )
    elif first.place < first.blocks:
        text += f", first in the output of block {first.name} ({first.place + 1} of {first.blocks}) {who}. {_OVERFLOW}"
    else:
        text += f", after the last of {first.blocks} blocks {who}. {_OVERFLOW}"
    status.tell(status.NOT_FINITE, text)
    return NotFiniteError(text, rank=rank, lost=False)
