"""Says where a prediction has stopped being finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import NotFiniteError
from ..wire.messages import NotFinite
from ..wire.typed import from_plain
from . import status
from .process import WorkerProcess

_ADVICE = (
    "Most often a value was too large for float16 (above 65504): choose another weight_dtype, or start ComfyUI with"
    " --bf16-unet or --fp32-unet; a LoRA of another model, or of a large strength, and a damaged file do it, too"
)
_ADVICE_INPUT = "Look at the node that makes it, e.g. the text encoder"


def not_finite(workers: Sequence[WorkerProcess], found: Sequence[Mapping[str, Any]], step: str = "") -> NotFiniteError:
    """The error, which is told to those who watch.

    Args:
        workers: the ranks.
        found: what each of them has met (`wire.messages.NotFinite`).
        step: which one, for people; by default the one that those who watch see.
    """
    places = [from_plain(NotFinite, dict(each)) for each in found]
    rank, first = min(enumerate(places), key=lambda entry: entry[1].place)
    who, advice = f"worker rank {rank} ({workers[rank].device.name}, pid {workers[rank].process.pid})", _ADVICE
    if first.place < 0:
        where, advice = f"in the input {first.name!r} that {who} was given", _ADVICE_INPUT
    elif first.place < first.blocks:
        before = f", {first.place} of {first.blocks} blocks before it gave finite ones" if first.place else ""
        where = f"first behind the block {first.name} on {who}{before}"
    else:
        where = f"behind all {first.blocks} blocks on {who}"
    sampling = status.sampling()
    if not step and sampling is not None and sampling.running:
        step = f"step {sampling.step + 1} of {sampling.steps}"
    prefix = f"{step}: " if step else ""
    text = f"{prefix}the model's prediction has values that are not finite (NaN or infinite), {where}. {advice}"
    status.tell(status.NOT_FINITE, text)
    return NotFiniteError(text, rank=rank, lost=False)
