"""TeaCache (SP): skips the blocks while the timestep has hardly changed their input."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.cache.settings import TeaCacheSettings
from .caching import with_cache


class SPTeaCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPTeaCache",
            display_name="TeaCache (SP)",
            category="sequence parallel",
            description=(
                "Faster, slightly different results: steps skip all blocks until the estimated changes of the output"
                " add up to the threshold. For models with published coefficients (see help), from this pack's loaders."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Diffusion Model (SP) or Load Checkpoint (SP), LoRAs and ModelSampling included.",
                ),
                io.Float.Input(
                    "rel_l1_thresh",
                    default=0.15,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Estimated relative change of the output since the last computed step (a ratio: 0.15 is"
                    " 15 %) below which the blocks are skipped. Larger is faster and less exact; 0 never skips."
                    " Published for HunyuanVideo 0.1 to 0.15, FLUX.1 from 0.25, Wan 14B 0.14 to 0.2, Wan 1.3B 0.05 to"
                    " 0.1, CogVideoX 1.5 0.1 to 0.3, Mochi 0.06 to 0.09, LTX-Video 0.03 to 0.05.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling (0 to 1) before which no step skips blocks. 0: steps may skip from"
                    " the start.",
                    advanced=True,
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.95,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling (0 to 1) after which no step skips blocks. 1: steps may skip until"
                    " the end.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(with_cache(model, TeaCacheSettings(**settings), cls.hidden.unique_id))
