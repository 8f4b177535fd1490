"""`python -m parallel plan`: what it drafts of classes that have plans, and of one that has none."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from parallel.plans.comfyui import PLANS
from tests.comfyui.installation import REPOSITORY, Installation

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def drafts(installation: Installation) -> dict[str, Any]:
    found = subprocess.run(
        [installation.python, "-m", "tests.comfyui.drafts"],
        cwd=REPOSITORY,
        env={**os.environ, "COMFYUI_PATH": str(installation.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    drafted: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return drafted


@pytest.mark.parametrize("name", ["Flux", "WanModel", "NextDiT"])
def test_the_draft_has_the_modules_arguments_and_routes_of_the_plan(drafts: dict[str, Any], name: str):
    plan = PLANS[name]
    assert not callable(plan)
    sites = drafts[name]["sites"]
    for path, site in plan.items():
        if path == "":
            continue  # a ControlNet's residuals, which were not given
        given = {argument for argument in site.cut if not argument.endswith("?")}
        assert set(sites[path]["cut"]) == given, path
        assert set(sites[path]["attention"]) == set(site.attention), path
        assert bool(sites[path]["join"]) == (site.join is not None), path
        for argument in (site.whole or "").removesuffix("?").split():
            assert argument not in sites[path]["cut"], (path, argument)
    assert set(sites) == set(plan) - {""}


def test_rules_name_streams_and_dims(drafts: dict[str, Any]):
    flux, wan, lumina = (drafts[name] for name in ("Flux", "WanModel", "NextDiT"))
    assert flux["streams"] == {"text": [7, 7, 71], "image": [35, 143, 35]}
    assert flux["sites"]["double_blocks"]["cut"] == {"img": "Tokens(I)", "txt": "Tokens(T)", "pe": "Tokens(TI, 2)"}
    assert flux["sites"]["single_blocks"]["attention"] == {"": "(TI, TI)"}
    assert flux["sites"]["final_layer"]["join"] == "Tokens(I)"
    assert wan["sites"]["blocks"]["cut"]["e"] == 'Grouped("image", 4)'
    assert wan["sites"]["blocks"]["attention"] == {"self_attn": "(I, I)"}
    assert lumina["sites"]["noise_refiner"]["join"] == "Tokens(I)"
    assert lumina["sites"]["layers"]["attention"] == {"": "(J, J)"}


def test_a_class_without_a_plan_is_drafted_and_one_whose_shapes_depend_on_values(drafts: dict[str, Any]):
    assert drafts["PixDiT_T2I"]["plan"] == ""
    assert set(drafts["PixDiT_T2I"]["sites"]) == {"patch_blocks", "pixel_blocks", "final_layer"}
    assert drafts["PixDiT_T2I"]["sites"]["patch_blocks"]["cut"]["pos_txt"] == "Tokens(T, 0)"
    assert set(drafts["HiDreamImageTransformer2DModel"]["sites"]["double_stream_blocks"]["cut"]) == {
        "image_tokens", "text_tokens", "rope",
    }  # fmt: skip


def test_the_text_shows_modules_shapes_and_attention_and_ends_with_what_exists(drafts: dict[str, Any]):
    lines = [line.strip() for line in drafts["WanModel"]["text"].splitlines()]
    for line in (
        "stream image: 45 tokens; 175 of the larger latent, 45 with more text",
        "blocks.0…1 (WanAttentionBlock)",
        "x [1, 45*, 384]  image",
        'e [1, 3, 6, 384]  Grouped("image", 4)?',
        "context [1, 7, 384]",
        "attention of 45 queries with 45 keys",
        "attention of 45 queries with 7 keys",
        "WAN_MODEL: Plan = {",
        "WanModel has this plan:",
    ):
        assert line in lines, line


def test_what_is_missing_is_named(drafts: dict[str, Any]):
    assert "the class is 'NoSuchModel', which is not in" in drafts["NoSuchModel"]["error"]
    assert "needs num_tokens, too" in drafts["OmniGen2Transformer2DModel"]["error"]
