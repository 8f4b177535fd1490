"""FP8 settings attached to a MODEL: its clones share one model in the workers, which get the settings at its load."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_patcher

from ..parallel.quantise.settings import FP8Settings

_ATTACHED = "sequence_parallel_fp8"


@dataclass(frozen=True, slots=True)
class AttachedFP8:
    """Settings that a node has attached to a MODEL."""

    settings: FP8Settings
    node_id: str
    """Id of the node that shows the result."""


def attach_fp8(model: comfy.model_patcher.ModelPatcher, settings: FP8Settings, node_id: str) -> None:
    model.set_attachments(_ATTACHED, AttachedFP8(settings, node_id))


def attached_fp8(model: comfy.model_patcher.ModelPatcher) -> AttachedFP8 | None:
    return model.attachments.get(_ATTACHED)
