"""Whether a template works after the conversion, by the pack's own tables."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.plans import comfyui as plans
from parallel.plans.comfyui import PLANS, ByModel, takes_control
from tests.templates.facts import Facts

ROOT = Path(__file__).parents[2]

REACHES: Mapping[str, str] = {
    "AnimaLLLiteApply": "patches",
    "BlockSparseAttention": "patches_replace",
    "MiniMaxH3FunControlNetApply": "patches",
    "ModelAttentionBackend": "optimized_attention_override",
    "QwenImageDiffsynthControlnet": "patches",
    "SkipLayerGuidanceDiT": "patches_replace",
    "SkipLayerGuidanceDiTSimple": "patches_replace",
    "USOStyleReference": "patches",
    "WanInfiniteTalkToVideo": "patches",
    "FluxKVCache": "the network's own attributes",
    "SamplerARVideo": "keys that the network keeps from step to step",
}
"""Node → what of the network it changes: an option of MODEL that holds code, or something else."""
PLAIN = frozenset(
    (
        "ARVideoI2V", "BasicGuider", "BasicScheduler", "BetaSamplingScheduler", "CFGGuider", "CFGNorm", "CFGOverride",
        "CFGZeroStar", "ChromaRadianceOptions", "ComfySwitchNode", "ContextWindowsManual", "DifferentialDiffusion",
        "DualCFGGuider", "DualModelGuider", "GetICLoRAParameters", "HiDreamO1PatchSeamSmoothing", "KSampler",
        "KSamplerAdvanced", "LatentApplyOperationCFG", "LTXVDualCFGGuider", "LTXVReferenceAudio", "LoraLoader",
        "LoraLoaderModelOnly", "MiniMaxH3SigmaShift", "ModelNoiseScale", "ModelSamplingAuraFlow", "ModelSamplingFlux",
        "ModelSamplingSD3", "QwenImage21Cache", "RescaleCFG", "SDTurboScheduler", "SamplerCustom", "ScaleROPE",
        "SeedVR2Conditioning", "TemporalScoreRescaling", "TripoSplatSamplingPreview", "UNetTemporalAttentionMultiply",
        "VideoLinearCFGGuidance", "WanAnimate2Cache",
    )
)  # fmt: skip
"""Nodes that change weights, the sampling around the network, or options that are plain data."""
OPTIONS = ("optimized_attention_override", "patches", "patches_replace")
"""Those of MODEL that the pack refuses or takes by its own table."""
CONTROL = ("ControlNetApply", "ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply")
FORMATS = ("16 bit", "fp8", "fp8_scaled", "fp8mixed", "int8_convrot", "mxfp8", "nvfp4")
"""Those whose files `tests/comfyui/test_quantised_networks.py` holds against ComfyUI's own results."""
LOADERS = ("SPLoadDiffusionModel", "SPLoadCheckpoint")
SPLIT, SIDE_BY_SIDE = "split", "side by side"


@dataclass(frozen=True)
class Verdict:
    """On one template."""

    newer: bool
    """It needs a newer ComfyUI."""
    refused: str = ""
    """By whom, and why."""
    unknown: str = ""
    """What nothing is known of here, so that nobody can say whether it works."""
    how: str = ""
    """`split`: every step on all devices; `side by side`: only the prompts and samples of a batch."""

    @property
    def works(self) -> bool:
        return not self.refused and not self.unknown

    def __str__(self) -> str:
        works = f"works, {self.how}"
        if self.refused:
            works = f"refused by {self.refused}"
        elif self.unknown:
            works = f"{self.unknown} is not known here"
        return f"needs a newer ComfyUI; there: {works}" if self.newer else works


def judge(facts: Facts, comfyui: str) -> Verdict:
    """The verdict on a template.

    Args:
        facts: what it needs.
        comfyui: the version that they were read with.
    """
    absent = [name for name in facts.networks if name in facts.missing]
    newer = bool(absent) or _version(facts.needs) > _version(comfyui)
    known = (*PLAIN, *REACHES)
    unknown = [name for name in absent if name not in PLANS]
    unknown += [name for name in (*facts.nodes, *facts.samplers) if name not in known]
    planned = all(name in PLANS for name in facts.networks)
    names = ", ".join(name.replace("?", "its class") for name in unknown)
    return Verdict(newer, next(_refusals(facts), ""), names, SPLIT if planned else SIDE_BY_SIDE)


def _refusals(facts: Facts) -> Iterator[str]:
    for left in facts.left:
        yield f"Use all GPUs: {left}"
    for loader in facts.loaders:
        if loader not in LOADERS:
            yield f"Use all GPUs: {loader} has no counterpart"
    for form in facts.quantised:
        if form not in FORMATS:
            yield f"the loader: {form}"
    options = refused_options()
    for node in (*facts.nodes, *facts.samplers, *facts.beside):
        reach = REACHES.get(node)
        if reach is None or _goes_as_data(node, facts.networks):
            continue
        if reach not in OPTIONS or reach in options:
            yield f"the first step: {node} ({options.get(reach, reach)})"
    if any(node in CONTROL for node in facts.beside):
        without = [name for name in facts.networks if not _takes_control(name)]
        if without:
            yield f"the first step: ControlNet, of {', '.join(without)}"


def refused_options() -> Mapping[str, str]:
    """The pack's: option of MODEL → what it calls it. Read from the source: to import it takes ComfyUI."""
    tree = ast.parse(_source("refusals"))
    assigned = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_OPTIONS"
    ]
    found: Mapping[str, str] = ast.literal_eval(assigned[0].value)
    return found


def _goes_as_data(node: str, networks: tuple[str, ...]) -> bool:
    """Whether the pack tells its workers what the node's code would do, for all these networks."""
    if node.startswith("SkipLayerGuidance"):
        handed_on = getattr(plans, "handed_on", None)
        return handed_on is not None and all(name not in PLANS or handed_on(name) for name in networks)
    return node == "ModelAttentionBackend" and "set_model_optimized_attention" in _source("options")


def _source(name: str) -> str:
    return (ROOT / "nodes" / f"{name}.py").read_text()


def _takes_control(network: str) -> bool:
    plan = PLANS.get(network, {})
    return all(map(takes_control, plan.plans if isinstance(plan, ByModel) else (plan,)))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
