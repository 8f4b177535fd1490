"""Networks of ComfyUI's own classes in a live server: the native loader against the pack's, and what is refused."""

import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import (
    Arrange,
    GraphBuilder,
    Link,
    ModelNode,
    Setting,
    Swapped,
    Text,
    fresh,
    model_node,
    sampling_graph,
    with_audio,
)
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import (
    FLUX,
    H3,
    KREA2,
    LORA,
    LTX23,
    PIXART,
    QWEN_IMAGE,
    SD35,
    STABLE_AUDIO_3,
    WAN,
    WAN_VACE,
    Z_IMAGE,
)
from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
TOLERANCE = 1e-4
"""Relative, after the steps of a sampling with CFG, which amplify the 1e-6 of one call (see `test_split`)."""
ONE, TWO, RING = Swapped("cpu"), Swapped("cpu,cpu"), Swapped("cpu,cpu", ring_degree=2)
CFG, DP = Swapped("cpu,cpu", cfg_degree=2), Swapped("cpu,cpu", dp_degree=2)
THREE = Swapped("cpu*4,cpu*2,cpu")
HYBRID = Swapped("cpu,cpu,cpu,cpu", ulysses_degree=2, ring_degree=2)


def with_control_video(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """A grey video that the result is to follow."""
    node, _ = builder.add(
        "WanVaceToVideo",
        positive=positive,
        negative=positive,
        vae=builder.add("SPTestVAE", channels=16, stride=8, seed=3),
        width=setting.width,
        height=setting.height,
        length=setting.length,
        batch_size=1,
        strength=0.7,
        control_video=builder.add("EmptyImage", width=64, height=48, batch_size=1, color=0x808080),
    )
    return [node, 0], [node, 2]


def with_picture(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """A reference of an odd size, with the timestep 0."""
    picture = builder.add("SPTestVideoLatent", seed=5, frames=0, height=6, width=5)
    positive = builder.add("ReferenceLatent", conditioning=positive, latent=picture)
    node = "FluxKontextMultiReferenceLatentMethod"
    return builder.add(node, conditioning=positive, reference_latents_method="index_timestep_zero"), latent


def with_control_net(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """Of the width of the tiny FLUX, HunyuanVideo, Qwen-Image and SD3.5, which reads residuals elsewhere."""
    applied = builder.add(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=positive,
        control_net=builder.add(
            "SPTestControlNet", width=256, place="output" if setting.checkpoint == SD35 else "input"
        ),
        image=builder.add("EmptyImage", width=64, height=48, batch_size=1, color=0x808080),
        strength=0.5,
        **WHOLE,
    )
    return applied, latent


def with_sound(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """A latent of 37 tokens of sound in the picture's place."""
    return positive, builder.add("EmptyLatentAudio", seconds=3.4, batch_size=1)


def by_wan_node(node: str, picture: str, outputs: tuple[int, int], **more: Any) -> Arrange:
    """A node of Wan's that puts a grey picture into the prompt. `outputs`: its positive prompt and latent."""

    def arrange(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
        node_id, _ = builder.add(
            node,
            positive=positive,
            negative=positive,
            vae=builder.add("SPTestVAE", channels=16, stride=8, seed=3),
            width=setting.width,
            height=setting.height,
            length=setting.length,
            batch_size=1,
            **{picture: builder.add("EmptyImage", width=64, height=48, batch_size=1, color=0x808080)},
            **more,
        )
        return [node_id, outputs[0]], [node_id, outputs[1]]

    return arrange


def texts(width: int, **positive: int) -> dict[str, Text]:
    return {"positive": Text(width=width, **positive), "negative": Text(seed=12, tokens=5, width=width)}


_H3 = Setting(
    checkpoint=H3, empty="EmptyMiniMaxH3LatentAV", audio=True, width=96, height=160, length=22, cfg=4.0, **texts(48)
)
_LTX23 = Setting(
    checkpoint=LTX23, empty="EmptyLTXVLatentVideo", audio=True, width=160, height=96, length=17, cfg=4.0,
    arrange=with_audio, **texts(192, tokens=8, valid=6),
)  # fmt: skip
_KREA2 = Setting(checkpoint=KREA2, picture=True, width=112, height=80, cfg=4.0, **texts(240))
_WAN = Setting(checkpoint=WAN, length=9, **texts(4096))
_VACE = Setting(checkpoint=WAN_VACE, cfg=4.0, length=9, width=80, arrange=with_control_video, **texts(4096))
_SD35 = Setting(checkpoint=SD35, picture=True, width=112, height=80, cfg=4.0, **texts(48))
CASES = {
    "h3": _H3,
    "ltx_2.3": _LTX23,
    "krea_2": _KREA2,
    "krea_2_reference": replace(_KREA2, arrange=with_picture),
    "z_image": Setting(checkpoint=Z_IMAGE, picture=True, width=112, height=144, cfg=4.0, **texts(48, tokens=19)),
    "wan_vace": _VACE,
    "wan_phantom": replace(_WAN, arrange=by_wan_node("WanPhantomSubjectToVideo", "images", (0, 3))),
    "flux_control_net": Setting(checkpoint=FLUX, picture=True, cfg=4.0, arrange=with_control_net),
    "hunyuan_control_net": Setting(arrange=with_control_net),
    "qwen_control_net": Setting(checkpoint=QWEN_IMAGE, picture=True, width=72, arrange=with_control_net),
    "sd_3.5": _SD35,
    "sd_3.5_control_net": replace(_SD35, arrange=with_control_net),
    "stable_audio_3": Setting(checkpoint=STABLE_AUDIO_3, picture=True, cfg=4.0, arrange=with_sound, **texts(768)),
}
EASY_CACHE = model_node("EasyCache", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)


def lora(strength: float) -> ModelNode:
    return model_node("LoraLoaderModelOnly", lora_name=LORA, strength_model=strength)


@pytest.mark.parametrize("name", CASES)
def test_same_latent_on_two_workers(server: ComfyServer, reference: Reference, name: str) -> None:
    assert relative_difference(sample(server, CASES[name], TWO), reference(CASES[name])) <= TOLERANCE


@pytest.mark.extended
@pytest.mark.parametrize("swapped", [ONE, RING, HYBRID, THREE], ids=["one", "ring", "hybrid", "three_unequal"])
@pytest.mark.parametrize("name", CASES)
def test_same_latent_under_every_split(server: ComfyServer, reference: Reference, name: str, swapped: Swapped) -> None:
    assert relative_difference(sample(server, CASES[name], swapped), reference(CASES[name])) <= TOLERANCE


def test_these_cases_show_their_conditioning(reference: Reference) -> None:
    """Those comparisons would notice a lost prompt, control video or reference."""
    other = {"positive": Text(seed=13, width=240)}
    for name, changes in {
        "krea_2": other,
        "krea_2_reference": {"arrange": None},
        "wan_vace": {"arrange": None},
        "ltx_2.3": {"positive": Text(seed=13, width=192)},
        "h3": {"positive": Text(seed=13, width=48)},
        "wan_phantom": {"arrange": None},
        "flux_control_net": {"arrange": None},
        "hunyuan_control_net": {"arrange": None},
        "qwen_control_net": {"arrange": None},
        "sd_3.5": {"positive": Text(seed=13, width=48)},
        "stable_audio_3": {"positive": Text(seed=13, width=768)},
        "sd_3.5_control_net": {"arrange": None},
    }.items():
        assert relative_difference(reference(CASES[name]), reference(replace(CASES[name], **changes))) > 1e-3, name


@pytest.mark.parametrize(
    "arrange",
    [
        by_wan_node("WanVaceToVideo", "control_video", (0, 2), strength=1.0),
        by_wan_node("WanCameraImageToVideo", "start_image", (0, 2)),
        by_wan_node("WanHuMoImageToVideo", "ref_image", (0, 2)),
    ],
    ids=["vace", "camera", "reference"],
)
def test_inputs_that_the_native_model_ignores_change_nothing(server: ComfyServer, arrange: Arrange) -> None:
    """A text-to-video model does not read them."""
    setting = replace(_WAN, arrange=arrange)
    assert relative_difference(sample(server, setting, TWO), sample(server, setting)) <= TOLERANCE


def test_easy_cache_skips_the_same_steps(server: ComfyServer, reference: Reference) -> None:
    setting = replace(_KREA2, steps=8, model_nodes=(EASY_CACHE,))
    assert relative_difference(reference(setting), reference(replace(_KREA2, steps=8))) > 1e-2
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE


def told_by_sampler(server: ComfyServer, start: int) -> str:
    return " ".join(event.data["bytes"].decode(errors="replace") for event in server.events("binary 3", since=start))


def test_first_block_cache_skips_and_tells(server: ComfyServer) -> None:
    """The same with both samplers: three of five steps, since the first and each after two hits are computed."""
    cache = model_node("SPFirstBlockCache", residual_diff_threshold=10.0, max_consecutive_hits=2, **WHOLE)
    setting = replace(_KREA2, steps=5)
    plain = sample(server, setting, TWO)
    latents = []
    for chain in (setting.chain, "sp_sampler"):
        start = server.mark()
        latents.append(sample(server, replace(setting, model_nodes=(cache,), chain=chain), TWO))
        told = told_by_sampler(server, start)
        found = re.search(r"First Block Cache \(SP\): skipped the blocks in (\d+) of (\d+)", told)
        assert found, told
        hits, passes = int(found[1]), int(found[2])
        assert passes % 5 == 0 and hits == passes // 5 * 3, told
    assert relative_difference(latents[0], plain) > 1e-3
    assert relative_difference(latents[1], latents[0]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("control_net")])
def test_sampler_sp_samples_in_the_workers(server: ComfyServer, reference: Reference, name: str) -> None:
    """Also where the latent has several parts."""
    start = server.mark()
    latent = sample(server, replace(CASES[name], chain="sp_sampler"), TWO)
    assert relative_difference(latent, reference(CASES[name])) <= TOLERANCE
    assert "in the workers" in told_by_sampler(server, start)


@pytest.mark.parametrize("chain", ["ksampler", "sp_sampler"])
@pytest.mark.parametrize("name", ["h3", "krea_2_reference"])
def test_cond_and_uncond_side_by_side(server: ComfyServer, reference: Reference, name: str, chain: str) -> None:
    """They have prompts of unequal lengths."""
    latent = sample(server, replace(CASES[name], chain=chain), CFG)
    assert relative_difference(latent, reference(CASES[name])) <= TOLERANCE


_PIXART = Setting(
    checkpoint=PIXART,
    width=512,
    height=384,
    empty_picture="EmptyLatentImage",
    picture=True,
    cfg=4.0,
    batch=3,
    **texts(4096),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "swapped",
    [DP, *(pytest.param(each, marks=pytest.mark.extended) for each in (TWO, Swapped("cpu,cpu,cpu,cpu")))],
    ids=["dp", "auto", "four"],
)
def test_a_class_without_a_plan_runs_its_prompts_and_samples_side_by_side(
    server: ComfyServer, reference: Reference, swapped: Swapped
) -> None:
    start = server.mark()
    assert relative_difference(sample(server, _PIXART, swapped), reference(_PIXART)) <= TOLERANCE
    assert "PixArtMS has no split plan: only prompts and samples of a batch run" in told_by_sampler(server, start)


@pytest.mark.parametrize(
    ("swapped", "knob"),
    [
        (Swapped("cpu,cpu", ulysses_degree=2), "ulysses_degree is 2"),
        (Swapped("cpu,cpu", ring_degree=2), "ring_degree is 2"),
        (Swapped("cpu,cpu", weights="offload"), "weights is 'offload'"),
    ],
)
def test_what_needs_a_plan_is_refused_by_name_without_one(server: ComfyServer, swapped: Swapped, knob: str) -> None:
    refused(server, _PIXART, swapped, [knob, "PixArtMS has no split plan"])


@pytest.mark.slow
def test_a_batch_side_by_side(server: ComfyServer, reference: Reference) -> None:
    batch, start = replace(_KREA2, batch=2, cfg=1.0, steps=1), server.mark()  # the schedule is as long as the batch
    assert relative_difference(sample(server, batch, DP), reference(batch)) <= TOLERANCE
    assert "dp 2" in told_by_sampler(server, start)


def test_a_lora_on_two_workers(server: ComfyServer, reference: Reference) -> None:
    patched = replace(_KREA2, model_nodes=(lora(0.8),))
    assert relative_difference(reference(patched), reference(_KREA2)) > 1e-3
    assert relative_difference(sample(server, patched, TWO), reference(patched)) <= TOLERANCE


@pytest.mark.parametrize("weights", ["shard", pytest.param("offload", marks=pytest.mark.extended)])
def test_sharded_and_offloaded_weights_have_the_bits_of_replicated_ones(server: ComfyServer, weights: str) -> None:
    """With a LoRA, of which each worker gets its part."""
    setting, mark = fresh(_KREA2, model_nodes=(lora(0.8),)), len(server.log())
    latent = sample(server, setting, replace(TWO, weights=weights))
    assert f"SingleStreamDiT, weights {weights} (as asked)" in server.log()[mark:]
    assert torch.equal(latent, sample(server, setting, replace(TWO, weights="replicate")))


def test_fp8_is_told_and_leaves_no_trace(server: ComfyServer) -> None:
    """What it computes: `test_network_homes`."""
    setting = replace(_KREA2, cfg=1.0, steps=2)
    fp8 = model_node("SPQuantizeFP8", scheme="auto", skip="blocks.1")
    plain, start = sample(server, setting, TWO), server.mark()
    assert relative_difference(sample(server, replace(setting, model_nodes=(fp8,)), TWO), plain) > 1e-3
    told = [event.data["bytes"].decode(errors="replace") for event in server.events("binary 3", since=start)]
    pattern = r"FP8 Quantize \(SP\): weight_only .*: 16 layers quantised, \d+ left as they are \(never quantised, or"
    assert any(re.search(pattern, text) for text in told), told
    assert torch.equal(sample(server, replace(setting, model_nodes=(lora(0.0),)), TWO), plain)


LONG = replace(_VACE, width=256, height=384, length=33, steps=50)


def start_long_sampling(server: ComfyServer) -> str:
    graph = sampling_graph(fresh(LONG), TWO)
    prompt_id = server.queue(graph)
    assert isinstance(prompt_id, str), prompt_id
    server.wait_for_event(lambda event: event.kind == "progress", prompt_id, timeout=120)
    return prompt_id


@pytest.mark.slow
def test_cancel_and_the_next_prompt(server: ComfyServer, reference: Reference) -> None:
    prompt_id = start_long_sampling(server)
    workers = server.workers()
    server.interrupt()
    assert server.wait(prompt_id).status == "interrupted"
    assert relative_difference(sample(server, _VACE, TWO), reference(_VACE)) <= TOLERANCE
    assert set(workers) <= set(server.workers()), "Cancel ended workers"


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_prompt_works(server: ComfyServer, reference: Reference) -> None:
    prompt_id = start_long_sampling(server)
    before = {worker: worker.cpu_seconds for worker in server.workers()}
    assert wait_until(lambda: len(_working(server, before)) >= 2, timeout=60)
    killed = _working(server, before)[-1]
    killed.kill()
    result = server.wait(prompt_id)
    assert result.status == "error" and re.search(r"rank [01]", result.message), result.message
    assert relative_difference(sample(server, _VACE, TWO), reference(_VACE)) <= TOLERANCE
    assert not killed.alive


def _working(server: ComfyServer, before: dict) -> list:
    return [worker for worker in server.workers() if worker.cpu_seconds > before.get(worker, 0.0) + 0.2]


NODES = {
    "teacache": (model_node("SPTeaCache", rel_l1_thresh=0.1, **WHOLE), ["TeaCache", "SingleStreamDiT"]),
    "attention": (model_node("SPTestAttention"), ["SPTestAttention", "attention override"]),
}  # fmt: skip
UNUSED = Swapped("cpu*5,cpu*3")
"""Nothing else has workers of these speeds."""


def refused(server: ComfyServer, setting: Setting, swapped: Swapped, patterns: list[str]) -> None:
    """With a message, and before any worker is started."""
    workers = set(server.workers())
    result = server.run(sampling_graph(setting, swapped))
    assert result.status == "error", f"the prompt ended with {result.status}: {result.message}"
    assert not [pattern for pattern in patterns if not re.search(pattern, result.message)], result.message
    assert not set(server.workers()) - workers, "processes were started for a prompt that cannot run"


@pytest.mark.parametrize("name", NODES)
def test_nodes_that_such_networks_do_not_have_yet_are_refused_by_name(server: ComfyServer, name: str) -> None:
    node, patterns = NODES[name]
    refused(server, replace(_KREA2, model_nodes=(node,)), UNUSED, patterns)


def test_controlnet_is_refused_where_the_plan_has_no_residuals(server: ComfyServer) -> None:
    def arrange(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
        applied = builder.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=positive,
            control_net=builder.add("SPTestControlNet", width=512),
            image=builder.add("EmptyImage", width=64, height=48, batch_size=1, color=0x808080),
            strength=1.0,
            **WHOLE,
        )
        return applied, latent

    refused(server, replace(_KREA2, arrange=arrange), UNUSED, ["ControlNet", "remove Apply ControlNet"])


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_compiled_blocks_agree_and_are_kept(server: ComfyServer, reference: Reference) -> None:
    compiled = replace(_KREA2, model_nodes=(model_node("SPTorchCompile", mode="default", dynamic=True),))
    plain = sample(server, _KREA2, TWO)
    mark = server.mark()
    difference = relative_difference(sample(server, compiled, TWO), plain)
    assert 0 < difference <= TOLERANCE, "0: nothing was compiled"
    assert relative_difference(plain, reference(_KREA2)) <= TOLERANCE
    sample(server, fresh(compiled), TWO)
    texts = [event.data["bytes"].decode(errors="replace") for event in server.events("binary 3", since=mark)]
    first, second = (text for text in texts if "Torch Compile (SP): " in text)
    assert "1 kind of blocks, 1 graph compiled in " in first
    assert second.endswith("1 kind of blocks, compiled before")


# Last, since one worker is another group, which takes seconds to start.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["krea_2", "wan_vace"])
def test_same_latent_on_one_worker(server: ComfyServer, reference: Reference, name: str) -> None:
    """To the bit where both have as many threads, which decides about the order of sums, and tensors lie alike in
    memory, on which some CPUs' products depend."""
    assert relative_difference(sample(server, CASES[name], ONE), reference(CASES[name])) <= 3e-6


@pytest.mark.slow
def test_a_lora_is_the_native_one_and_goes_again(server: ComfyServer, reference: Reference) -> None:
    patched = replace(_KREA2, model_nodes=(lora(0.8),))
    # Strength 0 is no LoRA, but another graph, so that ComfyUI does not answer from its cache.
    removed = replace(_KREA2, model_nodes=(lora(0.0),))
    expected = reference(patched)  # first: a graph without our loader makes ComfyUI forget the loaded model
    before = sample(server, _KREA2, ONE)
    mark = len(server.log())
    assert relative_difference(sample(server, patched, ONE), expected) <= 1e-6
    assert torch.equal(sample(server, removed, ONE), before)
    assert "MiB on each of" not in server.log()[mark:], "the file was read again"
