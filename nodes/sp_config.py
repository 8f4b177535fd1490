"""SP Config: which devices, and how they share the work."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.config import ATTENTION_KERNELS, ON_FAILURE, SequenceParallelConfig, resolve
from ..parallel.placement import MODES

SPConfig = io.Custom("SP_CONFIG")

_MAX_DEGREE = 64


class SPConfigNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def degree(name: str, tooltip: str) -> io.Input:
            return io.Int.Input(name, default=0, min=0, max=_MAX_DEGREE, tooltip=f"{tooltip} 0 chooses; 1 is off.")

        return io.Schema(
            node_id="SPConfig",
            display_name="SP Config",
            category="sequence parallel",
            description=(
                "Devices and degrees for Load Diffusion Model (SP) and the VAE nodes. The defaults use every GPU. The"
                " product of the degrees must be the number of devices."
            ),
            inputs=[
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="One worker process per device, e.g. cuda:0,cuda:1 or cpu,cpu. cuda:0*2,cuda:1*1 gives"
                    " the first GPU twice the work. auto: every visible GPU.",
                ),
                degree("ulysses_degree", "Number of devices that exchange attention heads for tokens (Ulysses)."),
                degree(
                    "ring_degree",
                    "Number of devices that pass keys and values around a ring; for more devices than heads.",
                ),
                degree(
                    "cfg_degree",
                    "Number of groups. 2: the positive and the negative prompt side by side, each on half of the"
                    " devices (CFG above 1).",
                ),
                degree("dp_degree", "Number of groups of devices that share the samples of a batch."),
                io.Combo.Input(
                    "weights",
                    options=list(MODES),
                    default="auto",
                    tooltip="Where weights live. replicate: a whole copy on each device. shard: a part on each device,"
                    " gathered block by block. offload: one copy in host memory for all devices. auto: the first of"
                    " these that fits.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION_KERNELS),
                    default="auto",
                    tooltip="Attention kernel in the workers. auto: ComfyUI's own choice, but PyTorch's in a ring."
                    " sdpa: PyTorch's. cudnn, flash and sage need a CUDA device; sage also needs the package"
                    " sageattention (8-bit: results differ slightly).",
                ),
                io.Combo.Input(
                    "on_failure",
                    options=list(ON_FAILURE),
                    default="error",
                    optional=True,
                    tooltip="What happens when a worker dies. error: the prompt fails, and the next prompt starts fresh"
                    " workers. retry: fresh workers load the model and repeat the failed step once; the result is the"
                    " same. If a GPU is out of memory, the prompt always fails, as it would run out again.",
                ),
            ],
            outputs=[SPConfig.Output(display_name="sp_config")],
        )

    @classmethod
    def validate_inputs(
        cls,
        devices: str | None = None,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        cfg_degree: int | None = None,
        dp_degree: int | None = None,
    ) -> bool:
        """Refuses wrong devices and degrees that do not fit them before a prompt is queued. `execute` checks the rest.

        None is an input whose value comes from a link and is not known yet.

        Raises:
            ConfigError: a value is not usable. ComfyUI shows the message once; it would repeat a returned text for each
                input named here.
        """
        degrees = {
            "ulysses_degree": ulysses_degree,
            "ring_degree": ring_degree,
            "cfg_degree": cfg_degree,
            "dp_degree": dp_degree,
        }
        if devices is None:
            return True
        known: dict[str, Any] = {} if None in degrees.values() else degrees
        resolve(SequenceParallelConfig(devices=devices, **known))
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        config = SequenceParallelConfig(**settings)
        resolve(config)
        return io.NodeOutput(config)
