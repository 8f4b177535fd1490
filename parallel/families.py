"""What works with which models, as tables: `python -m parallel families`, and those in README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .adapters.base import Adapter
from .adapters.registry import FAMILIES
from .cache.coefficients import PUBLISHED
from .plans.comfyui import CHAINS, DESCRIBED, PLANS, takes_control
from .split.blocks import reached_into

_TITLES = {
    "title": "family",
    "makes": "makes",
    "first_block_cache": "First Block Cache",
    "teacache": "TeaCache",
    "fp8": "FP8",
    "compiled": "compiled",
    "lora": "LoRA",
    "verified": "compared with",
}
_NETWORK_TITLES = {
    "title": "model",
    "makes": "makes",
    "network": "ComfyUI's class",
    "first_block_cache": "First Block Cache",
    "compiled": "compiled",
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "verified": "compared with ComfyUI's",
}


def families() -> list[dict[str, Any]]:
    """What each family can do. What works with every family, by how it is built, says yes for each."""
    return [_facts(adapter) for adapter in FAMILIES.values()]


def networks() -> list[dict[str, Any]]:
    """What each network of ComfyUI's own classes can do that no adapter takes."""
    found = []
    for name, described in DESCRIBED.items():
        plan = PLANS[name]
        assert not callable(plan), "a class whose networks differ has an adapter so far"
        found.append(
            {
                "title": described.title,
                "makes": list(described.makes),
                "network": name,
                "first_block_cache": "yes" if name in CHAINS else "no",
                "compiled": "yes" if described.compiled and not reached_into(plan) else "no",
                "controlnet": "yes" if takes_control(plan) else "no",
                "lora": "yes",
                "verified": described.verified,
            }
        )
    return found


def as_markdown() -> str:
    """The families as a table."""
    return _table(_TITLES, families())


def networks_as_markdown() -> str:
    """The networks as a table."""
    return _table(_NETWORK_TITLES, networks())


def _table(titles: Mapping[str, str], facts: Sequence[Mapping[str, Any]]) -> str:
    rows = [list(titles.values()), ["---"] * len(titles)]
    rows += [[", ".join(row[key]) if isinstance(row[key], list) else row[key] for key in titles] for row in facts]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _facts(adapter: type[Adapter]) -> dict[str, Any]:
    return {
        "family": adapter.family,
        "title": adapter.title,
        "makes": list(adapter.makes),
        "first_block_cache": "yes",
        "teacache": PUBLISHED.get(adapter.family, "none published"),
        "fp8": "yes" if adapter.not_quantised else "no",
        "compiled": "yes",
        "lora": "yes",
        "verified": adapter.verified,
    }
