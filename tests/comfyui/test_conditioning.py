"""Given pictures, masks, areas and schedules of prompts: one swapped loader node, the same latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.comfyui.graphs import Arrange, GraphBuilder, Link, Setting, Swapped, Text, fresh
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import FLUX, IMAGE_TO_VIDEO
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
OTHER = Text(seed=31, tokens=6)
SHORT = Text(seed=12, tokens=5)


# --- nodes before the sampler ---------------------------------------------------------------------------------------


def start_image(kind: str, frames: int = 1) -> Arrange:
    """HunyuanImageToVideo with this guidance_type."""

    def arrange(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
        size = {"width": setting.width, "height": setting.height, "batch_size": 1}
        image = builder.add("EmptyImage", color=0x808080, **(size | {"batch_size": frames}))
        vae = builder.add("SPTestVAE", channels=16, stride=8, seed=5)
        node = builder.add(
            "HunyuanImageToVideo", positive=positive, vae=vae, length=setting.length, guidance_type=kind,
            start_image=image, **size,
        )  # fmt: skip
        return node, [node[0], 1]

    return arrange


def references(*sizes: tuple[int, int], method: str = "") -> Arrange:
    """ReferenceLatent for each (width, height), and the node that sets the method."""

    def arrange(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
        for seed, (width, height) in enumerate(sizes):
            picture = builder.add("SPTestLatent", seed=seed, width=width, height=height)
            positive = builder.add("ReferenceLatent", conditioning=positive, latent=picture)
        if method:
            positive = builder.add(
                "FluxKontextMultiReferenceLatentMethod", conditioning=positive, reference_latents_method=method
            )
        return positive, latent

    return arrange


def right_half(builder: GraphBuilder, setting: Setting) -> Link:
    """A mask."""
    half = setting.width // 2
    full = builder.add("SolidMask", value=0.0, width=setting.width, height=setting.height)
    part = builder.add("SolidMask", value=1.0, width=half, height=setting.height)
    return builder.add("MaskComposite", destination=full, source=part, x=half, y=0, operation="add")


def noise_mask(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    return positive, builder.add("SetLatentNoiseMask", samples=latent, mask=right_half(builder, setting))


def beside_another_prompt(class_type: str, **inputs: object) -> Arrange:
    """The prompt behind this node, combined with another one."""

    def arrange(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
        values = dict(inputs)
        if class_type == "ConditioningSetMask":
            values["mask"] = right_half(builder, setting)
        positive = builder.add(class_type, conditioning=positive, **values)
        both = builder.add("ConditioningCombine", conditioning_1=positive, conditioning_2=builder.add_text(OTHER))
        return both, latent

    return arrange


def one_after_the_other(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    first = builder.add("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.6)
    second = builder.add("ConditioningSetTimestepRange", conditioning=builder.add_text(OTHER), start=0.6, end=1.0)
    return builder.add("ConditioningCombine", conditioning_1=first, conditioning_2=second), latent


MASKED = beside_another_prompt("ConditioningSetMask", strength=1.0, set_cond_area="default")
BOUNDS = beside_another_prompt("ConditioningSetMask", strength=1.0, set_cond_area="mask bounds")
AREA = beside_another_prompt("ConditioningSetArea", width=72, height=64, x=24, y=8, strength=1.0)
VIDEO_AREA = beside_another_prompt(
    "ConditioningSetAreaPercentageVideo",
    width=0.5, height=0.5, temporal=0.5, x=0.25, y=0.5, z=0.5, strength=1.0,
)  # fmt: skip

PICTURE = Setting(checkpoint=FLUX, picture=True)
LARGE_PICTURE = Setting(checkpoint=FLUX, picture=True, width=128, height=96)
LONG = Setting(width=48, height=80, length=9)  # 15 of 45 tokens are the first frame's
LARGE = Setting(width=128, height=96, length=9)

# setting, and the nodes that make the difference
CASES: dict[str, tuple[Setting, Arrange]] = {
    "v2_replace": (LONG, start_image("v2 (replace)")),
    "v2_replace_masked_text": (Setting(positive=Text(tokens=8, valid=5)), start_image("v2 (replace)")),
    "v2_replace_long_text": (Setting(positive=Text(tokens=30)), start_image("v2 (replace)")),
    "v2_replace_cfg": (Setting(cfg=4.0), start_image("v2 (replace)")),
    "v2_replace_two_frames": (LONG, start_image("v2 (replace)", frames=5)),
    "v1_concat": (Setting(checkpoint=IMAGE_TO_VIDEO), start_image("v1 (concat)")),
    "v1_concat_cfg": (Setting(checkpoint=IMAGE_TO_VIDEO, cfg=4.0, negative=SHORT), start_image("v1 (concat)")),
    "custom": (Setting(), start_image("custom")),
    "reference": (PICTURE, references((64, 48))),
    "odd_references": (Setting(checkpoint=FLUX, picture=True, width=72, height=56), references((56, 40), (24, 88))),
    "reference_cfg": (Setting(checkpoint=FLUX, picture=True, cfg=4.0), references((40, 48))),
    "reference_batch_2": (Setting(checkpoint=FLUX, picture=True, batch=2), references((40, 48))),
    "references_offset": (PICTURE, references((40, 48), (64, 64), method="offset")),
    "references_index": (PICTURE, references((40, 48), (64, 64), method="index")),
    "references_uxo": (PICTURE, references((40, 48), (64, 64), method="uxo/uno")),
    "noise_mask": (Setting(), noise_mask),
    "noise_mask_flux": (PICTURE, noise_mask),
    "area": (LARGE, VIDEO_AREA),
    "area_flux": (LARGE_PICTURE, AREA),
    "area_flux_cfg": (Setting(checkpoint=FLUX, picture=True, width=128, height=96, cfg=4.0), AREA),
    "mask": (Setting(), MASKED),
    "mask_flux": (PICTURE, MASKED),
    "mask_bounds_flux": (LARGE_PICTURE, BOUNDS),
    "schedule": (Setting(steps=5), one_after_the_other),
    "schedule_flux_cfg": (Setting(checkpoint=FLUX, picture=True, cfg=4.0, steps=5), one_after_the_other),
}


Native = Callable[[str], tuple[Setting, torch.Tensor]]


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[Setting, torch.Tensor]]:
    return {}


@pytest.fixture
def native(server: ComfyServer, known: dict[str, tuple[Setting, torch.Tensor]]) -> Native:
    """A case's setting and its native latent, sampled once."""

    def get(name: str) -> tuple[Setting, torch.Tensor]:
        if name not in known:
            setting, arrange = CASES[name]
            setting = fresh(setting, arrange=arrange)
            known[name] = setting, sample(server, setting)
        return known[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_nodes_make_a_difference(server: ComfyServer, native: Native, name: str) -> None:
    setting, expected = native(name)
    assert relative_difference(sample(server, replace(setting, arrange=None)), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("devices", [pytest.param("cpu", marks=pytest.mark.extended), "cpu,cpu"])
def test_same_latent(server: ComfyServer, native: Native, devices: str, name: str) -> None:
    setting, expected = native(name)
    assert relative_difference(sample(server, setting, Swapped(devices=devices)), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        pytest.param("v2_replace", Swapped(ring_degree=2), id="v2_ring"),
        pytest.param("v2_replace_cfg", Swapped(cfg_degree=2), id="v2_cfg"),
        pytest.param("odd_references", Swapped(ring_degree=2), id="references_ring"),
        pytest.param("reference_cfg", Swapped(cfg_degree=2), id="reference_cfg"),
        pytest.param("reference_batch_2", Swapped(dp_degree=2), id="reference_dp"),
        pytest.param("area_flux_cfg", Swapped(cfg_degree=2), id="area_cfg"),
        pytest.param("schedule_flux_cfg", Swapped(cfg_degree=2), id="schedule_cfg"),
        pytest.param("v2_replace", Swapped(devices="cpu,cpu,cpu"), id="v2_three_workers"),
        pytest.param("odd_references", Swapped(devices="cpu,cpu,cpu"), id="references_three_workers"),
    ],
)
def test_same_latent_with_explicit_degrees(server: ComfyServer, native: Native, name: str, swapped: Swapped) -> None:
    setting, expected = native(name)
    assert relative_difference(sample(server, setting, swapped), expected) <= TOLERANCE
