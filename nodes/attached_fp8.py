"""What a MODEL says of FP8: its clones share one model in the workers, so it is said to them when they load it."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_patcher

from ..parallel.quantise.settings import FP8Settings

_ATTACHED = "sequence_parallel_fp8"


@dataclass(frozen=True, slots=True)
class AttachedFP8:
    """A node's settings on a MODEL."""

    settings: FP8Settings
    node_id: str
    """Of the node that shows the result."""
    saved: int
    """Bytes by which weights on a device become less."""


def attach_fp8(model: comfy.model_patcher.ModelPatcher, attached: AttachedFP8) -> None:
    model.set_attachments(_ATTACHED, attached)


def attached_fp8(model: comfy.model_patcher.ModelPatcher) -> AttachedFP8 | None:
    return model.attachments.get(_ATTACHED)
