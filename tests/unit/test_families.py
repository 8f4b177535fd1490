"""The table of families: README's is the generated one, and it is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.adapters.registry import FAMILIES
from parallel.cache.coefficients import PUBLISHED, coefficients
from parallel.errors import UnsupportedError
from parallel.families import as_markdown, families, networks_as_markdown
from parallel.plans.comfyui import DESCRIBED, PLANS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("marks", "table"), [("families", as_markdown), ("networks", networks_as_markdown)])
def test_readme_has_the_generated_tables(marks: str, table: Callable[[], str]):
    """Else: python -m parallel families, and put them between the marks."""
    readme = (ROOT / "README.md").read_text()
    match = re.search(rf"<!-- {marks}:begin -->\n(.*)<!-- {marks}:end -->", readme, re.DOTALL)
    assert match is not None and match[1] == table()


def test_every_planned_network_is_described_or_has_an_adapter():
    adapted = {
        "AsymmDiTJoint", "CogVideoXTransformer3DModel", "Flux", "HunyuanVideo", "LTXVModel",
        "QwenImageTransformer2DModel", "WanModel",
    }  # fmt: skip
    assert set(PLANS) == set(DESCRIBED) | adapted


def test_every_family_has_a_row_with_its_own_title():
    table = families()
    assert [row["family"] for row in table] == list(FAMILIES)
    assert len({row["title"] for row in table}) == len(table)
    assert all(set(row["makes"]) <= {"T2V", "I2V", "T2I", "edit"} and row["makes"] for row in table)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PUBLISHED)))
def test_families_without_teacache_are_refused_it(family: str):
    with pytest.raises(UnsupportedError, match=f"no TeaCache coefficients have been published for {family}"):
        coefficients(family, {})


SIZES: dict[str, dict[str, Any]] = {
    "hunyuan_video": {},
    "flux": {},
    "mochi": {},
    "wan": {"num_attention_heads": 12, "in_channels": 16, "out_channels": 16, "image_dim": None},
    "cogvideox": {"num_attention_heads": 30, "in_channels": 16, "patch_size_t": None},
    "ltxv": {"num_layers": 28, "causal_temporal_positioning": False},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_families_with_teacache_have_a_polynomial(family: str):
    assert len(coefficients(family, SIZES[family])) == 5
