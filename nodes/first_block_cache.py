"""First Block Cache (SP): skips the blocks when the first one's effect has hardly changed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.cache.settings import FirstBlockCacheSettings
from .caching import with_cache
from .percent import end_percent, start_percent


class SPFirstBlockCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPFirstBlockCache",
            display_name="First Block Cache (SP)",
            category="sequence parallel",
            description=(
                "Faster, slightly different results: at a step whose first block does nearly what it did before, the"
                " other blocks are skipped and their last effect is added again. For Load Diffusion Model (SP)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model (SP), LoRAs and ModelSampling included."),
                io.Float.Input(
                    "residual_diff_threshold",
                    default=0.08,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Relative change of what the first block adds (a ratio: 0.08 is 8 %) below which the"
                    " other blocks are skipped. Larger is faster and less exact; 0 never skips.",
                ),
                start_percent(0.0),
                end_percent(1.0),
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
