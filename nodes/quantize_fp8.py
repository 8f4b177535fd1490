"""FP8 Quantize (SP): the large linear layers in FP8, or in comfy-kitchen's formats, in the workers."""

from __future__ import annotations

from typing import Any

from comfy.quant_ops import QUANT_ALGOS
from comfy_api.latest import io

from ..parallel.comfyui import contract
from ..parallel.errors import ConfigError, UnsupportedError
from ..parallel.quantise.settings import KITCHEN, NODE, SCHEMES, FP8Settings
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
                " GPUs that can (RTX 40 series and newer); or in ComfyUI's int8, mxfp8 or nvfp4. Slightly different"
                " results. LoRAs are applied first, wherever they stand in the graph. For this pack's loaders."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model (SP) or Load Checkpoint (SP)."),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default="auto",
                    tooltip="dynamic_rowwise: multiplies in FP8, one scale per token and channel."
                    " dynamic_tensorwise: the same with one scale per tensor, less exact. Both need compute capability"
                    " 8.9. weight_only: saves memory on any device, and computes as before. auto: the best one that"
                    " all devices can do; the node says which. int8_convrot: ComfyUI's 8-bit integers, multiplied as"
                    " such from the RTX 20 series on. mxfp8, nvfp4: ComfyUI's FP8 and FP4 in blocks, multiplied as such"
                    " on the RTX 50 series; other devices restore the weights at each call, which only saves memory.",
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
    """Returns a clone of the MODEL that the workers load in FP8.

    Raises:
        UnsupportedError: the MODEL is from another loader, or has FP8 settings from another such node.
        ConfigError: the devices or this ComfyUI do not support the scheme, or a pattern of `skip` matches no layer.
    """
    contract.require("fp8")
    if settings.scheme in KITCHEN:
        contract.require("kitchen")
        if KITCHEN[settings.scheme] not in QUANT_ALGOS:
            allowed = [scheme for scheme in SCHEMES if KITCHEN.get(scheme, "nvfp4") in QUANT_ALGOS]
            raise ConfigError(
                f"scheme is {settings.scheme!r}, which this ComfyUI does not have; allowed are {', '.join(allowed)}"
            )
    if not isinstance(model, SequenceParallelPatcher):
        raise refuse_loader(NODE, model, "Choose an fp8 weight_dtype there")
    if attached_fp8(model) is not None:
        raise UnsupportedError(f"{NODE} is in this MODEL's chain twice; remove one")
    model.held.select_fp8(settings)
    quantised = model.clone()
    attach_fp8(quantised, settings, node_id)
    return quantised
