"""First Block Cache (SP): skips the blocks when the first one's effect has hardly changed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.cache.settings import FirstBlockCacheSettings
from .caching import with_cache


class SPFirstBlockCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPFirstBlockCache",
            display_name="First Block Cache (SP)",
            category="sequence parallel",
            description=(
                "Faster, slightly different results: if the effect of the first block has hardly changed, a step skips"
                " the other blocks and adds their last effect again. For this pack's loaders."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Diffusion Model (SP) or Load Checkpoint (SP), LoRAs and ModelSampling included.",
                ),
                io.Float.Input(
                    "residual_diff_threshold",
                    default=0.08,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Relative change of what the first block adds (a ratio: 0.08 is 8 %) below which the"
                    " other blocks are skipped. Larger is faster and less exact; 0 never skips.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling (0 to 1) before which no step skips blocks. 0: steps may skip from"
                    " the start.",
                    advanced=True,
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling (0 to 1) after which no step skips blocks. 1: steps may skip until"
                    " the end.",
                    advanced=True,
                ),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps that may be skipped in a row, after which one is computed. 0: no limit.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(with_cache(model, FirstBlockCacheSettings(**settings), cls.hidden.unique_id))
