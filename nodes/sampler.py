"""Sampler (SP): KSampler, with all of its steps in the workers."""

from __future__ import annotations

import importlib
import time
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..parallel.comfyui import contract
from .in_workers import InWorkers, step_by_step
from .node_text import tell, tell_fallback
from .shell_patcher import SequenceParallelPatcher


class SPSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPSampler",
            display_name="Sampler (SP)",
            category="sequence parallel",
            description=(
                "KSampler, with the same result, for this pack's loaders: all steps run in the workers after one"
                " message, instead of one message for every step. If the workers cannot run a sampling, this node"
                " samples as KSampler does, and shows why."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Diffusion Model (SP) or Load Checkpoint (SP); any other is sampled as by"
                    " KSampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed used for creating the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How far the result is moved from the negative prompt's to the positive prompt's. At 1 the"
                    " negative prompt is not used, and a step takes half the time.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The algorithm. Nearly all of ComfyUI's run in the workers; dpm_adaptive does not.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise decreases over the steps.",
                ),
                io.Conditioning.Input("positive", tooltip="What the result should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, with its noise mask if it has one."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the noise to start from (0 to 1). Less keeps more of latent_image.",
                ),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
    ) -> io.NodeOutput:
        contract.require("sampler")
        comfy_nodes: Any = importlib.import_module("nodes")  # ComfyUI's, not this pack's
        in_workers = InWorkers()
        if isinstance(model, SequenceParallelPatcher):
            model = in_workers.attach(model)
        began = time.monotonic()
        (latent,) = comfy_nodes.common_ksampler(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        if not isinstance(model, SequenceParallelPatcher):
            seconds = time.monotonic() - began  # with the time that ComfyUI takes to load it
            in_workers.told = step_by_step(seconds, "this MODEL comes from another loader")
        text, node_id = f"Sampler (SP): {in_workers.told}", cls.hidden.unique_id
        if in_workers.stepwise:
            tell_fallback(node_id, text, f"Sampler (SP): {in_workers.stepwise}")
        else:
            tell(node_id, text)
        return io.NodeOutput(latent)
