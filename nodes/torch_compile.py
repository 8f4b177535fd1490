"""Torch Compile (SP): compiles the network's repeated blocks in the workers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.compilation.settings import MODES, CompileSettings
from .compiling import with_compiled_blocks


class SPTorchCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPTorchCompile",
            display_name="Torch Compile (SP)",
            category="sequence parallel",
            description=(
                "Faster steps after a slow first one: each kind of block is compiled once per worker, and kept for the"
                " next start. Where compiling fails, the blocks run as without this node, and it says why. For this"
                " pack's loaders."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Diffusion Model (SP) or Load Checkpoint (SP), LoRAs and ModelSampling included.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip="As in torch.compile. max-autotune-no-cudagraphs tries more kernels: compiling takes many"
                    " minutes, steps may be a little faster. The modes with CUDA graphs are left out: a graph cannot"
                    " hold the exchanges between the devices, and would overwrite what a cache keeps.",
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip="On: one compilation for all sizes, lengths and prompts. Off: each new size is compiled"
                    " again, for code that may be a little faster.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(with_compiled_blocks(model, CompileSettings(**settings), cls.hidden.unique_id))
