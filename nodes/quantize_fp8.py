"""FP8 Quantize (SP): the large linear layers in FP8, in the workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.comfyui import contract
from ..parallel.errors import UnsupportedError
from ..parallel.quantise.settings import NODE, SCHEMES, FP8Settings
from .attached_fp8 import attach_fp8, attached_fp8
from .refusals import refuse_loader
from .shell_patcher import SequenceParallelPatcher


class SPQuantizeFP8(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPQuantizeFP8",
            display_name="FP8 Quantize (SP)",
            category="sequence parallel",
            description=(
                "Keeps the weights of the blocks' linear layers in FP8, in half the memory, and multiplies in FP8 on"
                " GPUs that can (RTX 40 series and newer). Slightly different results. LoRAs are applied first,"
                " wherever they stand in the graph. For Load Diffusion Model (SP)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model (SP)."),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default="auto",
                    tooltip="dynamic_rowwise: multiplies in FP8, one scale per token and channel."
                    " dynamic_tensorwise: the same with one scale per tensor, less exact. Both need compute capability"
                    " 8.9. weight_only: saves memory on any device, and computes as before. auto: the best one that"
                    " all devices can do; the node says which.",
                ),
                io.String.Input(
                    "skip",
                    default="",
                    tooltip="Layers to leave as they are, besides embedders, modulations and the last layer:"
                    " comma-separated names or patterns, e.g. double_blocks.0, txt_mlp, single_blocks.*.linear2",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, scheme: str, skip: str) -> io.NodeOutput:
        return io.NodeOutput(_with_fp8(model, FP8Settings(scheme=scheme, skip=skip), cls.hidden.unique_id))


def _with_fp8(model: Any, settings: FP8Settings, node_id: str) -> SequenceParallelPatcher:
    """A clone of the MODEL that the workers load in FP8.

    Raises:
        UnsupportedError: a MODEL of another loader, or in FP8 by another such node.
        ConfigError: the devices cannot do what is asked for, or `skip` means no layer.
    """
    contract.require("fp8")
    if not isinstance(model, SequenceParallelPatcher):
        raise refuse_loader(NODE, model, "Choose an fp8 weight_dtype there")
    if attached_fp8(model) is not None:
        raise UnsupportedError(f"{NODE} is in this MODEL's chain twice; remove one")
    model.held.select_fp8(settings)
    quantised = model.clone()
    attach_fp8(quantised, settings, node_id)
    return quantised
