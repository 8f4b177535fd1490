"""Whether a template works after the conversion, by the pack's own tables and that of the nodes that tests have run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.plans.comfyui import PLANS, ByModel, handed_on, takes_control
from tests.comfyui.nodes_between import CASES, NEWER
from tests.templates.facts import Facts

WORKS = frozenset(case.node for case in CASES if not case.says) | {name for name, works in NEWER.items() if works}
"""Nodes with a MODEL that work, by the table that `tests/comfyui/test_nodes_between.py` runs."""
REFUSED = frozenset(case.node for case in CASES if case.says) | NEWER.keys() - WORKS
"""Those that do not."""
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
    known = WORKS | REFUSED
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
    for node in (*facts.nodes, *facts.samplers, *facts.beside):
        if node in REFUSED or (node.startswith("SkipLayerGuidance") and not _skip(facts.networks)):
            yield f"its name: {node}"
    if any(node in CONTROL for node in facts.beside):
        without = [name for name in facts.networks if not _takes_control(name)]
        if without:
            yield f"the first step: ControlNet, of {', '.join(without)}"


def _skip(networks: tuple[str, ...]) -> bool:
    """Whether all these networks can skip blocks."""
    return all(name not in PLANS or handed_on(name) for name in networks)


def _takes_control(network: str) -> bool:
    plan = PLANS.get(network, {})
    return all(map(takes_control, plan.plans if isinstance(plan, ByModel) else (plan,)))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
