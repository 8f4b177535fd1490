"""LoRA loaders act on the workers' weights just as they act on ComfyUI's own."""

from dataclasses import replace

import pytest
import torch

from tests.comfyui import lora_files
from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import (
    GraphBuilder,
    ModelNode,
    Setting,
    Swapped,
    Text,
    add_sampling,
    fresh,
    model_node,
    sampling_graph,
)
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import FLUX, FLUX2, FLUX_FOLDER, LTXV_CAUSAL, MOCHI, ORIGINAL_NAMES, QWEN_IMAGE, WAN
from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer
from tests.thinned import one_in

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
VISIBLE = 1e-2
"""What every LoRA here changes at least, relative."""
TWO = Swapped()


def lora(name: str, strength: float = 1.0) -> ModelNode:
    return model_node("LoraLoaderModelOnly", lora_name=f"{name}.safetensors", strength_model=strength)


def with_loras(base: Setting, *loras: ModelNode) -> Setting:
    return replace(base, model_nodes=loras)


HUNYUAN_VIDEO_BASE = Setting()
FLUX_BASE = Setting(checkpoint=FLUX, picture=True)
WAN_BASE = Setting(checkpoint=WAN, positive=Text(width=4096), negative=Text(seed=12, width=4096))
MOCHI_BASE = Setting(checkpoint=MOCHI, empty="EmptyMochiLatentVideo", length=13, positive=Text(tokens=8, valid=5))
BASES = {
    "hunyuan": HUNYUAN_VIDEO_BASE,
    "flux": FLUX_BASE,
    "wan": WAN_BASE,
    "mochi": MOCHI_BASE,
    "ltxv": replace(MOCHI_BASE, checkpoint=LTXV_CAUSAL, empty="EmptyLTXVLatentVideo", width=96, height=96),
    "qwen": Setting(checkpoint=QWEN_IMAGE, picture=True),
    "flux2": Setting(checkpoint=FLUX2, picture=True, empty_picture="EmptyFlux2LatentImage"),
}


def base_of(name: str) -> Setting:
    return BASES[name.partition("_")[0]]


def sample_anew(server: ComfyServer, setting: Setting, swapped: Swapped = TWO) -> torch.Tensor:
    """Samples, and makes sure that ComfyUI does not answer from its cache."""
    graph = sampling_graph(setting, swapped)
    result = server.run(graph)
    latent = read_latent(server, result)
    (sampler,) = (node_id for node_id, node in graph.items() if node["class_type"] == "KSampler")
    for event in server.events("execution_cached", result.prompt_id):
        assert sampler not in event.data["nodes"], "answered from the cache"
    return latent


ALL = lora_files.HUNYUAN_VIDEO + lora_files.FLUX + lora_files.WAN + lora_files.OTHERS


@pytest.mark.parametrize("name", one_in(3, [(n,) for n in ALL]))
def test_every_format_gives_the_native_latent(server: ComfyServer, reference: Reference, name: str) -> None:
    setting = with_loras(base_of(name), lora(name))
    expected = reference(setting)
    assert relative_difference(expected, reference(base_of(name))) > VISIBLE
    assert relative_difference(sample(server, setting, TWO), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, -0.7])
@pytest.mark.parametrize("name", ["hunyuan_native", "flux_diffusers"])
def test_any_strength_gives_the_native_latent(
    server: ComfyServer, reference: Reference, name: str, strength: float
) -> None:
    setting = with_loras(base_of(name), lora(name, strength))
    expected = reference(setting)
    assert relative_difference(expected, reference(with_loras(base_of(name), lora(name)))) > VISIBLE
    assert relative_difference(sample(server, setting, TWO), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "loras",
    [
        pytest.param((lora("hunyuan_native"), lora("hunyuan_kohya", -0.5)), id="hunyuan_disjoint"),
        pytest.param((lora("hunyuan_native", 0.5), lora("hunyuan_dora")), id="hunyuan_same_tensor"),
        pytest.param((lora("flux_diffusers"), lora("flux_kohya", 0.5)), id="flux_same_tensor"),
    ],
)
def test_stacked_loras_give_the_native_latent(
    server: ComfyServer, reference: Reference, loras: tuple[ModelNode, ...]
) -> None:
    base = base_of(dict(loras[0][1])["lora_name"])
    expected = reference(with_loras(base, *loras))
    for one in loras:
        assert relative_difference(expected, reference(with_loras(base, one))) > VISIBLE
    assert relative_difference(sample(server, with_loras(base, *loras), TWO), expected) <= TOLERANCE


def test_a_checkpoint_with_original_names(server: ComfyServer, reference: Reference) -> None:
    base = Setting(checkpoint=ORIGINAL_NAMES)
    setting = with_loras(base, lora("hunyuan_native"), lora("hunyuan_diffusion_pipe"))
    assert relative_difference(reference(setting), reference(base)) > VISIBLE
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE


@pytest.mark.parametrize("name", one_in(4, [(n,) for n in lora_files.FLUX]))
def test_a_diffusers_folder_gives_the_latent_of_the_single_file(
    server: ComfyServer, reference: Reference, name: str
) -> None:
    """Its tensors are parts of ComfyUI's, which is what ComfyUI patches."""
    setting = with_loras(FLUX_BASE, lora(name))
    actual = sample(server, replace(setting, checkpoint=FLUX_FOLDER), TWO)
    assert relative_difference(actual, reference(setting)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", pytest.param("fp8_e5m2", marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", ["hunyuan_native", "flux_diffusers"])
def test_fp8_weights_are_rounded_as_the_native_ones(
    server: ComfyServer, reference: Reference, name: str, weight_dtype: str
) -> None:
    """ComfyUI rounds patched fp8 weights at random, with a seed made of the weight's name."""
    base = replace(base_of(name), weight_dtype=weight_dtype)
    setting = with_loras(base, lora(name, 0.8))
    assert relative_difference(reference(setting), reference(base)) > VISIBLE
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE


def scaled(name: str, layout: str) -> Setting:
    """The base of a LoRA, from a file of scaled fp8."""
    family = {"hunyuan": "hunyuan_video"}.get(name.partition("_")[0], name.partition("_")[0])
    return replace(base_of(name), checkpoint=f"{family}_{layout}.safetensors")


SCALED = [
    *((name, "comfy_quant") for name in lora_files.HUNYUAN_VIDEO + lora_files.FLUX + lora_files.WAN),
    *((name, layout) for name in ("hunyuan_native", "flux_diffusers") for layout in ("scaled_0", "scaled_2")),
    ("hunyuan_native", "metadata"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), one_in(4, SCALED))
def test_scaled_fp8_weights_are_rounded_as_the_native_ones(
    server: ComfyServer, reference: Reference, name: str, layout: str
) -> None:
    """ComfyUI gives a patched weight a new scale, and rounds it to fp8 at random, with a seed made of its name."""
    base = scaled(name, layout)
    setting = with_loras(base, lora(name, 0.8))
    assert relative_difference(reference(setting), reference(base)) > VISIBLE
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE


def test_stacked_loras_on_scaled_fp8(server: ComfyServer, reference: Reference) -> None:
    setting = with_loras(scaled("flux", "scaled_2"), lora("flux_diffusers"), lora("flux_kohya", -0.5))
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name"),
    [
        pytest.param(HUNYUAN_VIDEO_BASE, "hunyuan_native", id="hunyuan"),
        pytest.param(FLUX_BASE, "flux_diffusers", id="flux"),
        pytest.param(scaled("hunyuan", "scaled_0"), "hunyuan_native", id="hunyuan_scaled_fp8"),
        pytest.param(scaled("flux", "comfy_quant"), "flux_diffusers", id="flux_scaled_fp8"),
    ],
)
def test_strengths_change_from_prompt_to_prompt_and_leave_no_trace(
    server: ComfyServer, base: Setting, name: str
) -> None:
    half = with_loras(base, lora(name, 0.5))
    without = sample_anew(server, base)
    workers = server.workers()
    first = sample_anew(server, half)
    assert relative_difference(first, without) > VISIBLE
    assert relative_difference(sample_anew(server, with_loras(base, lora(name, -0.7))), first) > VISIBLE
    assert torch.equal(sample_anew(server, with_loras(base, lora(name, 0.0))), without)
    assert torch.equal(sample_anew(server, half), first)
    assert torch.equal(sample_anew(server, base), without)
    assert server.workers() == workers


def test_weights_travel_once_and_with_progress(server: ComfyServer) -> None:
    """The next seed goes straight to its first step."""
    setting = with_loras(HUNYUAN_VIDEO_BASE, lora("hunyuan_native", 0.3))
    sample(server, fresh(HUNYUAN_VIDEO_BASE), TWO)
    first, second = (server.run(sampling_graph(fresh(setting), TWO)) for _ in range(2))
    told = [{event.data["max"] for event in server.events("progress", run.prompt_id)} for run in (first, second)]
    assert told[0] > {setting.steps}, "no progress of the weights"
    assert told[1] == {setting.steps}


def test_one_graph_may_use_the_model_with_and_without_a_lora(server: ComfyServer, reference: Reference) -> None:
    """Both samplers share the workers' one copy of the weights."""
    builder = GraphBuilder()
    model = builder.add_loader(HUNYUAN_VIDEO_BASE.checkpoint, TWO)
    class_type, inputs = lora("hunyuan_native")
    add_sampling(builder, HUNYUAN_VIDEO_BASE, model)
    add_sampling(builder, HUNYUAN_VIDEO_BASE, builder.add(class_type, model=model, **dict(inputs)), output="patched")
    result = server.run(builder.graph)
    expected = {
        "latent": reference(HUNYUAN_VIDEO_BASE),
        "patched": reference(with_loras(HUNYUAN_VIDEO_BASE, lora("hunyuan_native"))),
    }
    for output, latent in expected.items():
        assert relative_difference(read_latent(server, result, output), latent) <= TOLERANCE


def test_the_loader_for_model_and_text_encoder(server: ComfyServer, reference: Reference) -> None:
    builder = GraphBuilder()
    model = builder.add_loader(FLUX_BASE.checkpoint, TWO)
    loader = builder.add(
        "LoraLoader",
        model=model,
        clip=builder.add("SPTestNoClip"),
        lora_name="flux_kohya.safetensors",
        strength_model=0.6,
        strength_clip=1.0,
    )
    add_sampling(builder, FLUX_BASE, loader)
    expected = reference(with_loras(FLUX_BASE, lora("flux_kohya", 0.6)))
    assert relative_difference(read_latent(server, server.run(builder.graph)), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(HUNYUAN_VIDEO_BASE, id="fp32", marks=pytest.mark.extended),
        pytest.param(scaled("hunyuan", "metadata"), id="scaled_fp8"),
    ],
)
def test_fresh_workers_get_the_lora_too(server: ComfyServer, base: Setting) -> None:
    setting = fresh(with_loras(base, lora("hunyuan_native")))
    before = sample_anew(server, setting)
    workers = server.workers()
    workers[-1].kill()
    assert wait_until(lambda: not any(worker.alive for worker in workers), timeout=60)
    sample(server, fresh(setting), TWO)
    assert not set(server.workers()) & set(workers)
    assert torch.equal(sample_anew(server, setting), before)


def test_unloaded_models_come_back_with_the_lora(server: ComfyServer) -> None:
    setting = fresh(with_loras(HUNYUAN_VIDEO_BASE, lora("hunyuan_native")))
    before = sample_anew(server, setting)
    server.free()
    sample(server, fresh(setting), TWO)
    assert torch.equal(sample_anew(server, setting), before)
