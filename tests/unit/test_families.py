"""The table of models: README's is the generated one, and it is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from parallel.cache.settings import TeaCacheSettings
from parallel.errors import UnsupportedError
from parallel.families import as_markdown, families
from parallel.plans.comfyui import CHAINS, DESCRIBED, PLANS
from parallel.plans.published import known_as

ROOT = Path(__file__).parents[2]
TABLE = {row["network"]: row for row in families()}
WITH_TEACACHE = [network for network, described in DESCRIBED.items() if described.teacache]
PUBLISHED: dict[str, dict[str, Any]] = {
    "AsymmDiTJoint": {},
    "CogVideoXTransformer3DModel": {"num_attention_heads": 30, "in_channels": 16},
    "Flux": {"image_model": "flux", "vec_in_dim": 768},
    "HunyuanVideo": {"vec_in_dim": 768},
    "LTXVModel": {"num_layers": 28},
    "WanModel": {"num_heads": 12, "in_dim": 16, "out_dim": 16, "model_type": "t2v"},
}
"""What ComfyUI detects of a model whose polynomial has been published."""


def test_readme_has_the_generated_table():
    """Else: python -m parallel families, and put it between the marks."""
    readme = (ROOT / "README.md").read_text()
    match = re.search(r"<!-- families:begin -->\n(.*)<!-- families:end -->", readme, re.DOTALL)
    assert match is not None and match[1] == as_markdown()


def test_every_planned_network_has_a_row_with_its_own_title():
    assert list(TABLE) == list(DESCRIBED) and set(DESCRIBED) == set(PLANS)
    assert len({row["title"] for row in TABLE.values()}) == len(TABLE)
    assert all(
        set(row["makes"]) <= {"T2V", "I2V", "T2I", "T2A", "edit", "upscale"} and row["makes"] for row in TABLE.values()
    )


def test_every_cell_says_something():
    for row in TABLE.values():
        yes_or_no = {row[key] for key in ("first_block_cache", "fp8", "compiled", "controlnet", "lora")}
        assert (
            yes_or_no <= {"yes", "no"}
            and row["teacache"]
            and row["verified"] in ("samplings", "calls", "not yet: newer than 0.33")
        )
    assert as_markdown().count("\n") == len(TABLE) + 2


@pytest.mark.parametrize("network", sorted(set(DESCRIBED) - set(WITH_TEACACHE)))
def test_networks_without_teacache_are_refused_it(network: str):
    with pytest.raises(UnsupportedError, match=f"no TeaCache coefficients have been published for {network}"):
        TeaCacheSettings(rel_l1_thresh=0.1).rule(*known_as(network, {}))


@pytest.mark.parametrize("network", WITH_TEACACHE)
def test_networks_with_teacache_have_a_polynomial_and_what_it_is_of(network: str):
    assert CHAINS[network].modulated
    rule = TeaCacheSettings(rel_l1_thresh=0.1).rule(*known_as(network, PUBLISHED[network]))
    assert len(rule["coefficients"]) == 5
