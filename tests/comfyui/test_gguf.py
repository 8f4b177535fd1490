"""GGUF files by the layers of ComfyUI-GGUF: its own loader against the pack's, and what is refused without it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.comfyui.fixtures import ServerFactory, require_pack
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
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.server import ComfyServer, Graph, PromptResult

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

ONE, TWO = Swapped("cpu"), Swapped("cpu,cpu")
TOLERANCE = 1e-5
FLUX = Setting(checkpoint="tiny_flux.gguf", picture=True)
WAN = Setting(
    checkpoint="tiny_wan.gguf", length=9, positive=Text(width=4096), negative=Text(seed=12, tokens=5, width=4096)
)
CASES = {"flux": FLUX, "flux_f16": replace(FLUX, checkpoint="tiny_flux_f16.gguf"), "wan": replace(WAN, cfg=4.0)}


def lora(name: str, strength: float = 1.0) -> ModelNode:
    return model_node("LoraLoaderModelOnly", lora_name=f"{name}.safetensors", strength_model=strength)


@pytest.fixture(scope="module")
def gguf_server(start_server: ServerFactory, installation: Installation, model_files: Path) -> Iterator[ComfyServer]:
    """One with ComfyUI-GGUF, whose folder `COMFYUI_GGUF` names."""
    folder = os.environ.get("COMFYUI_GGUF")
    if not folder:
        pytest.skip("COMFYUI_GGUF names no folder of ComfyUI-GGUF")
    command = [str(installation.python), "-m", "tests.comfyui.gguf_files", str(model_files / "diffusion_models")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    with start_server(packs={"ComfyUI-GGUF": Path(folder)}) as server:
        require_pack(server)
        assert server.has_node("UnetLoaderGGUF"), server.log_tail()
        yield server


def native_graph(setting: Setting) -> Graph:
    """With ComfyUI-GGUF's loader."""
    builder = GraphBuilder()
    model = builder.add("UnetLoaderGGUF", unet_name=setting.checkpoint)
    for class_type, inputs in setting.model_nodes:
        model = builder.add(class_type, model=model, **dict(inputs))
    add_sampling(builder, setting, model)
    return builder.graph


@pytest.fixture(scope="module")
def expected(gguf_server: ComfyServer) -> dict[Setting, torch.Tensor]:
    return {}


@pytest.fixture
def native(gguf_server: ComfyServer, expected: dict[Setting, torch.Tensor]):
    def sampled(setting: Setting) -> torch.Tensor:
        if setting not in expected:
            expected[setting] = read_latent(gguf_server, gguf_server.run(native_graph(setting)))
        return expected[setting]

    return sampled


@pytest.mark.parametrize("name", CASES)
def test_the_native_loaders_latent(gguf_server: ComfyServer, native, name: str) -> None:
    """Bit by bit on one worker."""
    setting = CASES[name]
    assert torch.equal(sample(gguf_server, setting, ONE), native(setting))
    assert relative_difference(sample(gguf_server, setting, TWO), native(setting)) <= TOLERANCE


@pytest.mark.parametrize("weights", ["shard", "offload"])
def test_the_bytes_travel_quantised(gguf_server: ComfyServer, native, weights: str) -> None:
    """Also under a LoRA, whose patches every worker has."""
    mark = len(gguf_server.log())
    setting = replace(FLUX, model_nodes=(lora("flux_native", 0.7),))
    latent = sample(gguf_server, setting, replace(TWO, weights=weights))
    assert f"Flux, weights {weights} (as asked)" in gguf_server.log()[mark:]
    assert torch.equal(latent, sample(gguf_server, setting, replace(TWO, weights="replicate")))
    assert relative_difference(latent, native(setting)) <= TOLERANCE


def loaded_bytes(server: ComfyServer, start: int) -> float:
    """MiB on each worker, as the log has them."""
    return float(re.findall(r"Flux, weights .*: (\d+) MiB on each", server.log()[start:])[-1])


def test_workers_hold_the_quantised_bytes(gguf_server: ComfyServer, model_files: Path) -> None:
    start = len(gguf_server.log())
    sample(gguf_server, fresh(FLUX), Swapped("cpu*3,cpu*2", weights="replicate"))  # new workers, which load it anew
    size = (model_files / "diffusion_models" / FLUX.checkpoint).stat().st_size
    assert abs(loaded_bytes(gguf_server, start) - size / 2**20) <= 1


LORAS = ("flux_native", "flux_kohya", "flux_diffusers")


@pytest.mark.parametrize("name", LORAS)
def test_loras(gguf_server: ComfyServer, native, name: str) -> None:
    """On layers of every kind."""
    setting = replace(FLUX, model_nodes=(lora(name, 0.8),))
    assert relative_difference(native(setting), native(FLUX)) > 1e-3
    assert torch.equal(sample(gguf_server, setting, ONE), native(setting))
    assert relative_difference(sample(gguf_server, setting, TWO), native(setting)) <= TOLERANCE


def test_loras_stack_change_and_go(gguf_server: ComfyServer, native) -> None:
    for loras in ((lora("flux_native"), lora("flux_kohya", -0.5)), (lora("flux_native", 0.3),), ()):
        setting = replace(FLUX, seed=8, model_nodes=loras)
        assert torch.equal(sample(gguf_server, setting, ONE), native(setting)), loras


def refused(server: ComfyServer, graph: Graph, *patterns: str) -> None:
    workers = set(server.workers())
    result: PromptResult = server.run(graph)
    assert result.status in ("error", "rejected"), result.status
    missing = [pattern for pattern in patterns if not re.search(pattern, result.message)]
    assert not missing, f"the message does not match {missing}:\n{result.message}"
    assert not set(server.workers()) - workers, "processes were started for a prompt that cannot run"


def test_what_is_refused_with_the_pack(gguf_server: ComfyServer) -> None:
    unused = Swapped("cpu*5,cpu*3")
    fp8 = replace(FLUX, model_nodes=(model_node("SPQuantizeFP8", scheme="auto", skip=""),))
    refused(gguf_server, sampling_graph(fp8, unused), "FP8 Quantize", r"GGUF BF16, Q4_K, Q5_0, Q8_0")
    typed = replace(FLUX, weight_dtype="fp8_e4m3fn")
    refused(gguf_server, sampling_graph(typed, unused), "weight_dtype is 'fp8_e4m3fn'", "GGUF", "default")
    truncated = replace(FLUX, checkpoint="truncated.gguf")
    refused(gguf_server, sampling_graph(truncated, unused), r"truncated\.gguf", "damaged or incomplete")
    control = replace(FLUX, model_nodes=(lora("flux_control"),))
    sample(gguf_server, fresh(FLUX), TWO)  # LoRAs are looked at when the workers are up
    refused(gguf_server, sampling_graph(control, TWO), r"img_in\.weight", r"\[256, 128\]")
    absent = replace(FLUX, checkpoint="absent.gguf")
    refused(gguf_server, sampling_graph(absent, unused), r"unet_name is 'absent\.gguf'", "does not have")


def test_nodes_of_this_pack_say_which_loader_they_need(gguf_server: ComfyServer) -> None:
    builder = GraphBuilder()
    model = builder.add("UnetLoaderGGUF", unet_name=FLUX.checkpoint)
    cache = builder.add(
        "SPFirstBlockCache", model=model, residual_diff_threshold=0.1, start_percent=0.0, end_percent=1.0,
        max_consecutive_hits=0,
    )  # fmt: skip
    add_sampling(builder, FLUX, cache)
    refused(gguf_server, builder.graph, "First Block Cache", r"Load Diffusion Model \(SP\)", r"\.gguf file")


def test_without_the_pack_a_gguf_file_is_refused_by_its_name(server: ComfyServer) -> None:
    graph = sampling_graph(FLUX, Swapped("cpu*5,cpu*3"))
    refused(server, graph, r"tiny_flux\.gguf is a GGUF file", "ComfyUI-GGUF", r"Unet Loader \(GGUF\)", "not installed")
