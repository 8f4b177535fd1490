"""HunyuanVideo 1.5 and CogVideoX: one swapped loader node, the same latent. Each case runs under one split."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.comfyui import lora_files
from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import ModelNode, Setting, Swapped, Text, model_node
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import (
    COGVIDEOX,
    COGVIDEOX_15_I2V,
    COGVIDEOX_FOLDER,
    COGVIDEOX_I2V,
    COGVIDEOX_LEARNED,
    COGVIDEOX_SCALED,
    HUNYUAN_15,
    HUNYUAN_15_SCALED,
)
from tests.comfyui.server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-4
VISIBLE = 1e-2
ULYSSES, RING = Swapped(ulysses_degree=2), Swapped(ring_degree=2)
HYBRID = Swapped(devices="cpu,cpu,cpu,cpu", ulysses_degree=2, ring_degree=2)
CFG_AND_RING = Swapped(devices="cpu,cpu,cpu,cpu", cfg_degree=2, ring_degree=2)

_TEXT = Setting(
    checkpoint=HUNYUAN_15,
    empty="EmptyHunyuanVideo15Latent",
    width=80,
    height=48,
    length=9,  # 3 × 3 × 5 tokens
    positive=Text(glyphs=3),
    negative=Text(seed=12, tokens=5),
)
_IMAGE = replace(_TEXT, start_image="HunyuanVideo15ImageToVideo", image_tokens=7)
_COG = Setting(checkpoint=COGVIDEOX, width=72, height=56, length=9, negative=Text(seed=12, tokens=5))
_COG_IMAGE = replace(_COG, checkpoint=COGVIDEOX_I2V, start_image="WanImageToVideo")
_COG_15 = replace(_COG_IMAGE, checkpoint=COGVIDEOX_15_I2V)  # 3 frames of latent, 2 of them in a patch
_DPMPP = {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform"}

# Workers are started anew where the number of devices changes: the cases are in that order.
CASES = {
    "hunyuan_15_cfg_unequal_prompts": (replace(_TEXT, cfg=4.0), ULYSSES),
    "hunyuan_15_i2v_batch_2": (replace(_IMAGE, batch=2, **_DPMPP), RING),
    "hunyuan_15_scaled_fp8": (replace(_TEXT, checkpoint=HUNYUAN_15_SCALED), ULYSSES),
    "cogvideox_cfg_unequal_prompts": (replace(_COG, cfg=4.0), ULYSSES),
    "cogvideox_i2v_cfg": (replace(_COG_IMAGE, cfg=4.0, **_DPMPP), RING),
    "cogvideox_15_i2v_batch_2": (replace(_COG_15, batch=2), ULYSSES),
    "cogvideox_15_i2v_one_frame_encoded": (replace(_COG_15, start_image="InstructPixToPixConditioning", cfg=4.0), RING),
    "cogvideox_learned_positions": (replace(_COG, checkpoint=COGVIDEOX_LEARNED), RING),
    "cogvideox_scaled_fp8": (replace(_COG, checkpoint=COGVIDEOX_SCALED), RING),
    "hunyuan_15_sampler_in_the_workers": (replace(_IMAGE, cfg=4.0, chain="sp_sampler"), ULYSSES),
    "cogvideox_sampler_in_the_workers": (replace(_COG_15, chain="sp_sampler"), ULYSSES),
    "hunyuan_15_offload": (_IMAGE, Swapped(weights="offload")),
    "cogvideox_shard": (_COG_15, Swapped(weights="shard")),
    # ComfyUI itself fails on a mask where there are glyphs, or more than one sample.
    "hunyuan_15_padded_text": (replace(_TEXT, positive=Text(tokens=8, valid=5)), HYBRID),
    "hunyuan_15_i2v_cfg": (replace(_IMAGE, cfg=4.0), CFG_AND_RING),
    "cogvideox_15_i2v_cfg": (replace(_COG_15, cfg=4.0), HYBRID),
}
PLAIN = (
    "hunyuan_15_cfg_unequal_prompts",
    "cogvideox_15_i2v_batch_2",
    "cogvideox_sampler_in_the_workers",
    "hunyuan_15_i2v_cfg",
)
"""The plain run has these; the others, and their LoRAs, are extended."""


@pytest.mark.parametrize(
    "name", [name if name in PLAIN else pytest.param(name, marks=pytest.mark.extended) for name in CASES]
)
def test_same_latent(server: ComfyServer, reference: Reference, name: str) -> None:
    setting, swapped = CASES[name]
    expected = reference(replace(setting, chain="ksampler"))
    difference = relative_difference(sample(server, setting, swapped), expected)
    print(f"{name}: {difference:.1e}")
    # CogVideoX starts at a sigma of 4519, so the order of sums shows: the workers' sampler has its own.
    assert difference <= (5e-4 if name == "cogvideox_sampler_in_the_workers" else TOLERANCE)


@pytest.mark.extended
@pytest.mark.parametrize("name", [name for name, (setting, _) in CASES.items() if setting.chain == "ksampler"])
@pytest.mark.parametrize("swapped", [ULYSSES, RING, HYBRID], ids=["ulysses", "ring", "hybrid"])
def test_same_latent_under_every_split(server: ComfyServer, reference: Reference, swapped: Swapped, name: str) -> None:
    setting, _ = CASES[name]
    difference = relative_difference(sample(server, setting, swapped), reference(setting))
    print(f"{name}: {difference:.1e}")
    assert difference <= TOLERANCE


def test_a_diffusers_folder_gives_what_its_single_file_gives(server: ComfyServer, reference: Reference) -> None:
    """CogVideoX 1.5 is published as a folder only, which ComfyUI's own loader does not read."""
    folder = replace(_COG, checkpoint=COGVIDEOX_FOLDER)
    assert relative_difference(sample(server, folder, ULYSSES), reference(_COG)) <= TOLERANCE


def test_those_comparisons_notice_a_lost_input(reference: Reference) -> None:
    latent = reference(_IMAGE)
    assert relative_difference(latent, reference(replace(_IMAGE, image_tokens=0))) > VISIBLE
    assert relative_difference(latent, reference(replace(_TEXT, image_tokens=0))) > VISIBLE
    assert relative_difference(latent, reference(replace(_IMAGE, positive=Text()))) > VISIBLE
    latent = reference(_COG_IMAGE)
    assert relative_difference(latent, reference(replace(_COG_IMAGE, start_image=""))) > VISIBLE


def lora(name: str) -> tuple[ModelNode, ...]:
    return (model_node("LoraLoaderModelOnly", lora_name=f"{name}.safetensors", strength_model=0.8),)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, replace(base, checkpoint=checkpoint))
        for base, names, checkpoints in [
            (_TEXT, lora_files.HUNYUAN_15, (HUNYUAN_15, HUNYUAN_15_SCALED)),
            (_COG, lora_files.COGVIDEOX, (COGVIDEOX, COGVIDEOX_SCALED)),
        ]
        for name in names
        for checkpoint in checkpoints
    ],
    ids=lambda value: value if isinstance(value, str) else value.checkpoint,
)
def test_loras_give_the_native_latent(server: ComfyServer, reference: Reference, name: str, base: Setting) -> None:
    setting = replace(base, model_nodes=lora(name))
    assert relative_difference(reference(setting), reference(base)) > VISIBLE
    assert relative_difference(sample(server, setting, ULYSSES), reference(setting)) <= TOLERANCE
