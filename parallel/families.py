"""The families of the registry as a table: `python -m parallel families`, and the one in README."""

from __future__ import annotations

from typing import Any

from .adapters.base import Adapter
from .adapters.registry import FAMILIES
from .cache.coefficients import PUBLISHED

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


def families() -> list[dict[str, Any]]:
    """What each family can do. What works with every family, by how it is built, says yes for each."""
    return [_facts(adapter) for adapter in FAMILIES.values()]


def as_markdown() -> str:
    """The same as a table."""
    rows = [list(_TITLES.values()), ["---"] * len(_TITLES)]
    for facts in families():
        rows.append([", ".join(value) if isinstance(value := facts[key], list) else value for key in _TITLES])
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
