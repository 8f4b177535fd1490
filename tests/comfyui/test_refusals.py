"""Bad input is refused with a message that says what is wrong, before any work."""

import re
from collections.abc import Iterator

import pytest
import torch

from tests.comfyui import model_files
from tests.comfyui.graphs import (
    GraphBuilder,
    Setting,
    Swapped,
    Text,
    add_sampling,
    fresh,
    model_node,
    sampling_graph,
)
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.server import ComfyServer, Graph, PromptResult

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
UNUSED = Swapped(devices="cpu*5,cpu*3")
"""Nothing else has workers of these speeds: a prompt that gets so far as to need them would start them."""
WAN = Setting(checkpoint=model_files.WAN, positive=Text(width=4096), negative=Text(seed=12, width=4096))


def refusal(server: ComfyServer, graph: Graph) -> PromptResult:
    """Run a graph that must be refused, without starting a process."""
    workers = set(server.workers())
    result = server.run(graph)
    assert result.status in ("error", "rejected"), f"the prompt ended with {result.status}"
    assert not set(server.workers()) - workers, "processes were started for a prompt that cannot run"
    assert len(result.message) < 2000, "the message is too long to read"
    texts = [line.partition(" - ")[2] or line for line in result.message.splitlines()]
    assert len(set(texts)) == len(texts), (
        f"the same text is shown {len(texts) - len(set(texts)) + 1} times: {texts[-1]}"
    )
    return result


def assert_says(message: str, *patterns: str) -> None:
    missing = [pattern for pattern in patterns if not re.search(pattern, message, re.IGNORECASE)]
    assert not missing, f"the message does not match {missing}:\n{message}"


@pytest.fixture(autouse=True)
def works_afterwards(server: ComfyServer) -> Iterator[None]:
    yield
    sample(server, fresh(Setting()), TWO)


@pytest.mark.parametrize(
    ("checkpoint", "patterns"),
    [
        pytest.param("absent.safetensors", [r"absent\.safetensors"], id="missing"),
        pytest.param(
            model_files.TRUNCATED, [r"truncated\.safetensors", "truncated|incomplete|cut|size"], id="truncated"
        ),
        pytest.param(model_files.CORRUPT_HEADER, [r"corrupt_header\.safetensors", "header"], id="corrupt_header"),
        pytest.param(model_files.SD_LIKE, [r"sd_like\.safetensors", "support|recogni[sz]e|detect"], id="sd"),
        pytest.param(
            model_files.SVDQUANT_LIKE,
            [r"svdquant_like\.safetensors", "as SVDQuant", "use the model's bf16", "ComfyUI-nunchaku"],
            id="svdquant",
        ),
        pytest.param(model_files.AURA_FLOW_LIKE, [r"aura_flow_like\.safetensors", "recogni[sz]e"], id="unknown"),
    ],
)
def test_unusable_checkpoint(server: ComfyServer, checkpoint: str, patterns: list[str]) -> None:
    result = refusal(server, sampling_graph(Setting(checkpoint=checkpoint), TWO))
    assert_says(result.message, *patterns)


@pytest.mark.parametrize(
    ("swapped", "patterns"),
    [
        pytest.param(Swapped("cpu,cpu", ulysses_degree=3), ["ulysses_degree", r"\b3\b", r"\b2\b"], id="degree"),
        pytest.param(
            Swapped("cpu,cpu,cpu", ring_degree=2, ulysses_degree=2),
            ["ring_degree|ulysses_degree", r"\b3\b"],
            id="product",
        ),
        pytest.param(Swapped("cuda:7"), ["devices", r"cuda:7"], id="absent_device"),
        pytest.param(Swapped("tpu"), ["devices", "tpu", "cpu"], id="unknown_device"),
        pytest.param(Swapped("cpu,,cpu"), ["devices"], id="empty_device"),
        pytest.param(Swapped("cpu,cuda:0"), ["devices"], id="mixed_devices"),
    ],
)
def test_unusable_configuration(server: ComfyServer, swapped: Swapped, patterns: list[str]) -> None:
    if swapped.devices == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    assert_says(refusal(server, sampling_graph(Setting(), swapped)).message, *patterns)


def test_a_lora_in_bypass_mode_is_refused(server: ComfyServer) -> None:
    lora = model_node("LoraLoaderBypassModelOnly", lora_name="hunyuan_native.safetensors", strength_model=1.0)
    setting = Setting(model_nodes=(lora,))
    assert relative_difference(sample(server, setting), sample(server, Setting())) > 1e-3
    assert_says(refusal(server, sampling_graph(setting, TWO)).message, "lora in bypass mode", "load lora")


def test_a_lora_that_changes_a_shape_is_refused(server: ComfyServer) -> None:
    lora = model_node("LoraLoaderModelOnly", lora_name="flux_control.safetensors", strength_model=1.0)
    setting = Setting(checkpoint=model_files.FLUX, picture=True, model_nodes=(lora,))
    sample(server, fresh(Setting()), TWO)  # the workers may be up: the weights are looked at only then
    assert_says(refusal(server, sampling_graph(setting, TWO)).message, "lora", r"img_in\.weight", r"\[256, 128\]")


def hooked_graph(setting: Setting, swapped: Swapped | None) -> Graph:
    """A LoRA on the positive prompt only."""
    builder = GraphBuilder()
    hooks = builder.add("CreateHookLoraModelOnly", lora_name="hunyuan_native.safetensors", strength_model=1.0)
    add_sampling(builder, setting, builder.add_loader(setting.checkpoint, swapped))
    (sampler,) = (node for node in builder.graph.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["positive"] = builder.add(
        "ConditioningSetProperties",
        cond_NEW=sampler["inputs"]["positive"],
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    return builder.graph


def test_a_lora_hook_is_refused(server: ComfyServer) -> None:
    hooked = read_latent(server, server.run(hooked_graph(Setting(), None)))
    assert relative_difference(hooked, sample(server, Setting())) > 1e-3
    assert_says(refusal(server, hooked_graph(Setting(), TWO)).message, "hook")


@pytest.mark.parametrize("order", ["native first", "native second", "both"])
def test_model_merge_is_refused(server: ComfyServer, order: str) -> None:
    builder = GraphBuilder()
    sides = {"native first": (None, TWO), "native second": (TWO, None), "both": (TWO, TWO)}[order]
    first, second = (builder.add_loader(model_files.TINY, side) for side in sides)
    add_sampling(builder, Setting(), builder.add("ModelMergeSimple", model1=first, model2=second, ratio=0.5))
    assert_says(refusal(server, builder.graph).message, "merg")


def test_free_u_fails_as_with_the_native_loader(server: ComfyServer) -> None:
    """It knows UNets only, and ComfyUI's own model of this kind makes it fail, too."""
    setting = Setting(model_nodes=(model_node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),))
    results = [refusal(server, sampling_graph(setting, swapped)) for swapped in (None, UNUSED)]
    assert {(result.node_type, result.message) for result in results} == {("FreeU_V2", "'model_channels'")}


@pytest.mark.parametrize("node", ["ModelMergeAdd", "ModelMergeSubtract"])
def test_other_merging_nodes_are_refused(server: ComfyServer, node: str) -> None:
    builder = GraphBuilder()
    first, second = (builder.add_loader(model_files.TINY, side) for side in (None, UNUSED))
    extra = {"multiplier": 1.0} if node == "ModelMergeSubtract" else {}
    add_sampling(builder, Setting(), builder.add(node, model1=first, model2=second, **extra))
    assert_says(refusal(server, builder.graph).message, "merging", "ModelMerge")


@pytest.mark.parametrize("node", ["ModelSave", "CheckpointSave"])
def test_saving_the_model_is_refused(server: ComfyServer, node: str) -> None:
    builder = GraphBuilder()
    model = builder.add_loader(model_files.TINY, UNUSED)
    vae = {"channels": 16, "stride": 8, "seed": 3}
    parts = (
        {"clip": builder.add("SPTestNoClip"), "vae": builder.add("SPTestVAE", **vae)}
        if node == "CheckpointSave"
        else {}
    )
    builder.add(node, model=model, filename_prefix="saved/test", **parts)
    result = refusal(server, builder.graph)
    assert_says(result.message, "saving the model", "native|Load Diffusion Model")
    assert result.node_type == node
