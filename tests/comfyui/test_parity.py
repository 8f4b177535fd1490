"""One swapped loader node, the same seed: the same latent."""

from dataclasses import replace

import pytest
import torch

from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import (
    GraphBuilder,
    Link,
    Setting,
    Swapped,
    Text,
    fresh,
    model_node,
    two_stage_graph,
)
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import (
    FLUX,
    FLUX2,
    FLUX2_KLEIN,
    FLUX_KINDS,
    HUNYUAN_VIDEO_KINDS,
    LTXV,
    LTXV_CAUSAL,
    MOCHI,
    NO_GUIDANCE,
    ORIGINAL_NAMES,
    QWEN_IMAGE,
    QWEN_IMAGE_2511,
    TINY,
    WAN,
    WAN_22_5B,
    WAN_22_I2V,
    WAN_I2V,
)
from tests.comfyui.server import ComfyServer
from tests.thinned import one_in

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.extended),
    "cpu,cpu",
    pytest.param("cpu,cpu,cpu", marks=pytest.mark.extended),
]
ULYSSES, RING = Swapped(ulysses_degree=2), Swapped(ring_degree=2)
HYBRID = Swapped(devices="cpu,cpu,cpu,cpu", ulysses_degree=2, ring_degree=2)
SHORT = Text(seed=12, tokens=5)
MASKED = Text(tokens=8, valid=5)
ODD = Setting(width=48, height=80, length=9)  # 45 tokens
BIG = Setting(width=256, height=384, length=33, steps=4)
# From the first to the last step: EasyCache takes other bounds from the shift of whichever model sampled before.
EASY_CACHE = model_node("EasyCache", reuse_threshold=0.8, start_percent=0.0, end_percent=1.0, verbose=False)

# ComfyUI itself fails on a mask with more than one sample in a call, so masks are compared at batch 1.
CASES = {
    "euler": Setting(),
    "dpmpp_2m": Setting(sampler="dpmpp_2m", scheduler="sgm_uniform", steps=4),
    "basic_guider": Setting(chain="basic_guider"),
    "cfg_guider": Setting(chain="cfg_guider", cfg=4.0),
    "cfg_equal_prompts": Setting(cfg=4.0),
    "cfg_unequal_prompts": Setting(cfg=4.0, negative=SHORT),
    "masked": Setting(positive=MASKED),
    "cfg_masked": Setting(cfg=4.0, positive=MASKED, negative=SHORT),
    "one_text_token": Setting(positive=Text(tokens=1)),
    "batch_2": Setting(batch=2),
    "batch_2_cfg": Setting(batch=2, cfg=4.0, negative=SHORT),
    "odd_tokens": ODD,
    "shift": Setting(model_nodes=(model_node("ModelSamplingSD3", shift=3.0),)),
    "easy_cache": Setting(steps=8, model_nodes=(EASY_CACHE,)),
}

_DPMPP = {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform", "steps": 4}
_FLUX = Setting(checkpoint=FLUX, picture=True)
_WAN = Setting(positive=Text(width=4096), negative=Text(seed=12, width=4096), length=9)
_WAN_I2V = replace(_WAN, checkpoint=WAN_I2V, start_image="WanImageToVideo", image_tokens=5)
_WAN_5B = replace(_WAN, checkpoint=WAN_22_5B, start_image="Wan22ImageToVideoLatent", width=96, height=64)
_CONTEXT_WINDOWS = model_node(
    "WanContextWindowsManual",
    context_length=9,
    context_overlap=4,
    context_schedule="standard_uniform",
    context_stride=1,
    closed_loop=False,
    fuse_method="pyramid",
    freenoise=True,
    retain_first_frame=False,
    split_conds_to_windows=False,
)
CASES |= {
    "flux_63_text_tokens": replace(_FLUX, positive=Text(tokens=63)),
    "flux_odd_size_cfg": replace(_FLUX, width=72, height=56, cfg=4.0, negative=SHORT),
    "flux_dpmpp_2m_batch_2": replace(_FLUX, batch=2, **_DPMPP),
    "wan_t2v": replace(_WAN, checkpoint=WAN),
    "wan_t2v_cfg": replace(_WAN, checkpoint=WAN, cfg=4.0, negative=Text(seed=12, tokens=5, width=4096), **_DPMPP),
    "wan_t2v_batch_2": replace(_WAN, checkpoint=WAN, batch=2, width=72, height=56, **_DPMPP),
    "wan_i2v": _WAN_I2V,
    "wan_i2v_cfg": replace(_WAN_I2V, cfg=4.0, **_DPMPP),
    "wan_i2v_without_clip": replace(_WAN_I2V, image_tokens=0, cfg=4.0),
    "wan_i2v_context_windows": replace(_WAN_I2V, length=25, cfg=4.0, model_nodes=(_CONTEXT_WINDOWS,)),
    "wan_22_i2v": replace(_WAN_I2V, checkpoint=WAN_22_I2V, **_DPMPP),
    "wan_22_i2v_without_clip": replace(_WAN_I2V, checkpoint=WAN_22_I2V, image_tokens=0, cfg=4.0, batch=2),
    "wan_22_5b": _WAN_5B,
    "wan_22_5b_cfg": replace(_WAN_5B, cfg=4.0, **_DPMPP),
    "wan_22_5b_odd_batch_2": replace(_WAN_5B, cfg=4.0, batch=2, height=48),
}


def with_references(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """Two pictures of odd sizes."""
    for seed, (height, width) in enumerate([(5, 4), (3, 7)]):
        picture = builder.add("SPTestVideoLatent", seed=seed, frames=1, height=height, width=width)
        positive = builder.add("ReferenceLatent", conditioning=positive, latent=picture)
    return positive, latent


def with_pictures(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """Two pictures for FLUX.2."""
    for seed, (height, width) in enumerate([(5, 4), (3, 7)]):
        picture = builder.add("SPTestVideoLatent", seed=seed, frames=0, height=height, width=width, channels=128)
        positive = builder.add("ReferenceLatent", conditioning=positive, latent=picture)
    return positive, latent


def with_clean_pictures(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """The same, with the timestep 0."""
    positive, latent = with_pictures(builder, setting, positive, latent)
    node = "FluxKontextMultiReferenceLatentMethod"
    return builder.add(node, conditioning=positive, reference_latents_method="index_timestep_zero"), latent


# The network sees their texts' padding only as a mask, which Mochi's text encoder always gives.
_MOCHI = Setting(
    checkpoint=MOCHI, empty="EmptyMochiLatentVideo", length=13, positive=MASKED, negative=Text(12, tokens=8, valid=3)
)
_LTXV = replace(_MOCHI, checkpoint=LTXV, empty="EmptyLTXVLatentVideo", width=128, height=96, length=17)
_QWEN = Setting(checkpoint=QWEN_IMAGE, picture=True, positive=MASKED, negative=Text(12, tokens=5))
_FLUX2 = Setting(
    checkpoint=FLUX2, picture=True, empty_picture="EmptyFlux2LatentImage", width=112, height=80, negative=SHORT
)
# Sampled with one plan each: every one costs a server two samplings.
SINGLE = {
    "mochi_cfg": replace(_MOCHI, cfg=4.0),
    "mochi_odd_batch_2": replace(_MOCHI, batch=2, width=48, height=80, **_DPMPP),
    "mochi_one_text_token": replace(_MOCHI, length=19, positive=Text(tokens=9, valid=1)),
    "ltxv_cfg": replace(_LTXV, cfg=4.0),
    "ltxv_image": replace(_LTXV, checkpoint=LTXV_CAUSAL, start_image="LTXVImgToVideo"),
    "ltxv_odd_image_batch_2": replace(
        _LTXV, checkpoint=LTXV_CAUSAL, start_image="LTXVImgToVideo", batch=2, cfg=4.0, width=96, **_DPMPP
    ),
    "qwen_image_cfg": replace(_QWEN, cfg=4.0),
    "qwen_image_odd_batch_2": replace(_QWEN, width=72, height=56, batch=2, **_DPMPP),
    "qwen_image_references": replace(_QWEN, cfg=4.0, arrange=with_references),
    "qwen_image_2511": replace(_QWEN, checkpoint=QWEN_IMAGE_2511, arrange=with_references),
    "flux2_cfg": replace(_FLUX2, cfg=4.0),
    "flux2_klein_batch_2": replace(_FLUX2, checkpoint=FLUX2_KLEIN, batch=2, **_DPMPP),
    "flux2_references": replace(_FLUX2, cfg=4.0, arrange=with_pictures),
    "flux2_clean_references": replace(_FLUX2, arrange=with_clean_pictures),
}


def test_these_cases_show_their_masks_and_pictures(reference: Reference) -> None:
    """Those comparisons would notice a lost mask, start image or reference."""
    whole = Text(tokens=8, valid=7)
    for name, other in {
        "mochi_cfg": {"positive": whole},
        "ltxv_cfg": {"positive": whole},
        "ltxv_image": {"start_image": ""},
        "qwen_image_cfg": {"positive": whole},
        "qwen_image_references": {"arrange": None},
        "flux2_references": {"arrange": None},
        "flux2_clean_references": {"arrange": with_pictures},
    }.items():
        setting = SINGLE[name]
        assert relative_difference(reference(setting), reference(replace(setting, **other))) > 1e-3, name


def test_easy_cache_case_skips_steps(reference: Reference) -> None:
    assert relative_difference(reference(CASES["easy_cache"]), reference(Setting(steps=8))) > 1e-2


@pytest.mark.parametrize("name", one_in(2, [(name,) for name in CASES]))
@pytest.mark.parametrize("devices", DEVICES)
def test_same_latent(server: ComfyServer, reference: Reference, devices: str, name: str) -> None:
    actual = sample(server, CASES[name], Swapped(devices=devices))
    assert relative_difference(actual, reference(CASES[name])) <= TOLERANCE


@pytest.mark.parametrize("checkpoint", [ORIGINAL_NAMES, NO_GUIDANCE])
def test_same_latent_from_other_checkpoints(server: ComfyServer, reference: Reference, checkpoint: str) -> None:
    setting = Setting(checkpoint=checkpoint)
    assert relative_difference(sample(server, setting, Swapped()), reference(setting)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", one_in(3, [(kind,) for kind in (*HUNYUAN_VIDEO_KINDS, *FLUX_KINDS)]))
def test_same_latent_from_other_dtypes(server: ComfyServer, reference: Reference, checkpoint: str) -> None:
    setting = Setting(checkpoint=checkpoint, picture=checkpoint in FLUX_KINDS)
    expected = reference(setting)
    whole = replace(setting, checkpoint=FLUX if setting.picture else TINY)
    assert relative_difference(expected, reference(whole)) > 1e-4, "the same network, but rounded"
    assert relative_difference(sample(server, setting, Swapped()), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        pytest.param("masked", Swapped(ulysses_degree=2), id="ulysses"),
        pytest.param("masked", Swapped(ring_degree=2), id="ring"),
        pytest.param("cfg_unequal_prompts", Swapped(cfg_degree=2), id="cfg"),
        pytest.param("batch_2", Swapped(dp_degree=2), id="dp"),
        pytest.param("flux_63_text_tokens", Swapped(ring_degree=2), id="flux_ring"),
        pytest.param("flux_odd_size_cfg", Swapped(ring_degree=2), id="flux_ring_cfg"),
        pytest.param("flux_dpmpp_2m_batch_2", Swapped(ring_degree=2), id="flux_ring_batch"),
        pytest.param("wan_22_5b_cfg", Swapped(ring_degree=2), id="wan_ring"),
        pytest.param("wan_i2v_cfg", Swapped(cfg_degree=2), id="wan_cfg"),
        pytest.param("wan_22_5b_odd_batch_2", Swapped(dp_degree=2), id="wan_dp"),
        pytest.param("mochi_cfg", Swapped(ulysses_degree=2), id="mochi_ulysses_cfg"),
        pytest.param("mochi_odd_batch_2", Swapped(ring_degree=2), id="mochi_ring_batch"),
        pytest.param("ltxv_cfg", Swapped(ulysses_degree=2), id="ltxv_ulysses_cfg"),
        pytest.param("ltxv_odd_image_batch_2", Swapped(ring_degree=2), id="ltxv_ring_batch"),
        pytest.param("qwen_image_cfg", Swapped(ulysses_degree=2), id="qwen_image_ulysses_cfg"),
        pytest.param("qwen_image_odd_batch_2", Swapped(dp_degree=2), id="qwen_image_dp"),
        pytest.param("qwen_image_references", Swapped(ring_degree=2), id="qwen_image_ring_references"),
        pytest.param("flux2_cfg", Swapped(ulysses_degree=2), id="flux2_ulysses_cfg"),
        pytest.param("flux2_klein_batch_2", Swapped(dp_degree=2), id="flux2_klein_dp"),
        pytest.param("flux2_references", Swapped(ring_degree=2), id="flux2_ring_references"),
        # one after the other: another number of workers is another group, and takes seconds to start
        pytest.param("odd_tokens", HYBRID, id="hybrid"),
        pytest.param("wan_t2v", HYBRID, id="wan_hybrid"),
        pytest.param("mochi_one_text_token", HYBRID, id="mochi_hybrid"),
        pytest.param("ltxv_image", HYBRID, id="ltxv_hybrid"),
        pytest.param("qwen_image_2511", HYBRID, id="qwen_image_hybrid"),
        pytest.param("flux2_clean_references", HYBRID, id="flux2_hybrid_clean_references"),
    ],
)
def test_same_latent_with_explicit_degrees(
    server: ComfyServer, reference: Reference, name: str, swapped: Swapped
) -> None:
    setting = (CASES | SINGLE)[name]
    assert relative_difference(sample(server, setting, swapped), reference(setting)) <= TOLERANCE


@pytest.mark.extended
@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("swapped", [ULYSSES, RING, HYBRID], ids=["ulysses", "ring", "hybrid"])
def test_same_latent_of_every_case_under_every_split(
    server: ComfyServer, reference: Reference, swapped: Swapped, name: str
) -> None:
    difference = relative_difference(sample(server, SINGLE[name], swapped), reference(SINGLE[name]))
    print(f"{name}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["shard", "offload"])
def test_same_latent_wherever_the_weights_are(server: ComfyServer, reference: Reference, weights: str) -> None:
    case = CASES["cfg_unequal_prompts"]
    mark = len(server.log())
    actual = sample(server, case, Swapped(weights=weights))
    assert relative_difference(actual, reference(case)) <= TOLERANCE
    assert f"weights {weights} (as asked)" in server.log()[mark:]


@pytest.mark.slow
def test_same_wan_latent_from_two_models_in_turn(server: ComfyServer) -> None:
    """As Wan 2.2 A14B: one model for the noisy steps, another one for the rest. Both stay for the next prompt."""
    case = CASES["wan_i2v_cfg"]
    expected = read_latent(server, server.run(two_stage_graph(WAN_22_I2V, WAN_I2V, case)))
    for weights in ("auto", "shard", "offload"):
        mark = len(server.log())
        for setting in (case, fresh(case)):
            outputs = server.run(two_stage_graph(WAN_22_I2V, WAN_I2V, setting, Swapped(weights=weights)))
            if setting is case:
                assert relative_difference(read_latent(server, outputs), expected) <= TOLERANCE
        assert server.log()[mark:].count("safetensors: WanModel, weights ") == 2


def test_wan_cases_show_the_first_frame(reference: Reference) -> None:
    """Those comparisons would notice a lost CLIP image, start image or noise mask."""
    latent = reference(CASES["wan_i2v"])
    assert relative_difference(latent, reference(replace(_WAN_I2V, image_tokens=0))) > 1e-2
    assert relative_difference(latent, reference(replace(_WAN_I2V, start_image="", image_tokens=0))) > 1e-2
    given = torch.randn(1, 48, 1, 4, 6, generator=torch.Generator().manual_seed(3))  # as SPTestVAE makes it
    assert relative_difference(reference(CASES["wan_22_5b"])[:, :, :1], given) < TOLERANCE


@pytest.mark.slow
def test_the_workers_do_the_work(server: ComfyServer, reference: Reference) -> None:
    """Both workers compute; ComfyUI's own process hardly does."""
    sample(server, fresh(Setting()), Swapped())  # start-up is not to be counted
    workers = server.workers()
    before = {worker: worker.cpu_seconds for worker in workers}
    own = server.process.cpu_seconds
    actual = sample(server, BIG, Swapped())
    own = server.process.cpu_seconds - own
    gained = sorted((worker.cpu_seconds - before[worker] for worker in workers), reverse=True)
    assert len(gained) >= 2 and gained[1] > 0.25, f"CPU seconds of the workers: {gained}"
    assert sum(gained) > 3 * own, f"workers {gained} s, server {own} s of CPU time"
    assert gained[1] > gained[0] / 3, f"one worker did most of the work: {gained}"
    assert relative_difference(actual, reference(BIG)) <= TOLERANCE
