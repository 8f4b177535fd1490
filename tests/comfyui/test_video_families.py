"""HunyuanVideo 1.5: one swapped loader node, the same latent. Each case runs under one split."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.comfyui import lora_files
from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import ModelNode, Setting, Swapped, Text, model_node
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import HUNYUAN_15, HUNYUAN_15_SCALED
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
VISIBLE = 1e-2
ULYSSES, RING = Swapped(ulysses_degree=2), Swapped(ring_degree=2)
HYBRID = Swapped(devices="cpu,cpu,cpu,cpu", ulysses_degree=2, ring_degree=2)
CFG_AND_RING = Swapped(devices="cpu,cpu,cpu,cpu", cfg_degree=2, ring_degree=2)

_TEXT = Setting(
    checkpoint=HUNYUAN_15,
    empty_latent="EmptyHunyuanVideo15Latent",
    width=80,
    height=48,
    length=9,  # 3 × 3 × 5 tokens
    positive=Text(glyphs=3),
    negative=Text(seed=12, tokens=5),
)
_IMAGE = replace(_TEXT, start_image="HunyuanVideo15ImageToVideo", image_tokens=7)
CASES = {
    "hunyuan_15_cfg_unequal_prompts": (replace(_TEXT, cfg=4.0), ULYSSES),
    # ComfyUI itself fails on a mask where there are glyphs, or more than one sample.
    "hunyuan_15_padded_text": (replace(_TEXT, positive=Text(tokens=8, valid=5)), HYBRID),
    "hunyuan_15_i2v_batch_2": (replace(_IMAGE, batch=2, sampler="dpmpp_2m", scheduler="sgm_uniform"), RING),
    "hunyuan_15_i2v_cfg": (replace(_IMAGE, cfg=4.0), CFG_AND_RING),
    "hunyuan_15_scaled_fp8": (replace(_TEXT, checkpoint=HUNYUAN_15_SCALED), ULYSSES),
}


@pytest.mark.parametrize("name", CASES)
def test_same_latent(server: ComfyServer, reference: Reference, name: str) -> None:
    setting, swapped = CASES[name]
    assert relative_difference(sample(server, setting, swapped), reference(setting)) <= TOLERANCE


def test_those_comparisons_notice_a_lost_input(reference: Reference) -> None:
    latent = reference(_IMAGE)
    assert relative_difference(latent, reference(replace(_IMAGE, image_tokens=0))) > VISIBLE
    assert relative_difference(latent, reference(replace(_TEXT, image_tokens=0))) > VISIBLE
    assert relative_difference(latent, reference(replace(_IMAGE, positive=Text()))) > VISIBLE


def lora(name: str) -> tuple[ModelNode, ...]:
    return (model_node("LoraLoaderModelOnly", lora_name=f"{name}.safetensors", strength_model=0.8),)


@pytest.mark.parametrize("checkpoint", [HUNYUAN_15, HUNYUAN_15_SCALED])
@pytest.mark.parametrize("name", lora_files.HUNYUAN_15)
def test_loras_give_the_native_latent(server: ComfyServer, reference: Reference, name: str, checkpoint: str) -> None:
    base = replace(_TEXT, checkpoint=checkpoint)
    setting = replace(base, model_nodes=lora(name))
    assert relative_difference(reference(setting), reference(base)) > VISIBLE
    assert relative_difference(sample(server, setting, ULYSSES), reference(setting)) <= TOLERANCE
