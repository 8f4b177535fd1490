"""Table of the features that work with each model: `python -m parallel families`, also shown in README."""

from __future__ import annotations

from typing import Any

from .plans.comfyui import CHAINS, DESCRIBED, PLANS, ByModel, takes_control
from .split.blocks import reached_into

_TITLES = {
    "title": "model",
    "makes": "makes",
    "network": "ComfyUI's class",
    "first_block_cache": "First Block Cache",
    "teacache": "TeaCache",
    "fp8": "FP8",
    "compiled": "compiled",
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "verified": "compared with ComfyUI's",
}


def families() -> list[dict[str, Any]]:
    """Returns the features of each of ComfyUI's networks; features that work with all by design are always "yes"."""
    found = []
    for name, described in DESCRIBED.items():
        plan = PLANS[name]
        plans = plan.plans if isinstance(plan, ByModel) else (plan,)
        found.append(
            {
                "title": described.title,
                "makes": list(described.makes),
                "network": name,
                "first_block_cache": _yes(name in CHAINS),
                "teacache": described.teacache or "no",
                "fp8": "yes",
                "compiled": _yes(described.compiled and not any(map(reached_into, plans))),
                "controlnet": _yes(all(map(takes_control, plans))),
                "lora": "yes",
                "verified": described.verified,
            }
        )
    return found


def as_markdown() -> str:
    """Returns `families` as a Markdown table."""
    rows = [list(_TITLES.values()), ["---"] * len(_TITLES)]
    rows += [[", ".join(row[key]) if isinstance(row[key], list) else row[key] for key in _TITLES] for row in families()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(does: bool) -> str:
    return "yes" if does else "no"
