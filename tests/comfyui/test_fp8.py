"""FP8 Quantize (SP) in a live server: what it changes, what it tells, that it leaves no trace, and what is refused."""

import re

import pytest
import torch

from tests.comfyui.graphs import GraphBuilder, ModelNode, Setting, Swapped, fresh, model_node, sampling_graph
from tests.comfyui.latents import relative_difference, sample
from tests.comfyui.model_files import FLUX
from tests.comfyui.server import ComfyServer
from tests.comfyui.test_lora import lora, sample_anew

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
BASE = Setting(checkpoint=FLUX, picture=True)
TEXT_EVENT = "binary 3"


def fp8(scheme: str = "auto", skip: str = "") -> ModelNode:
    return model_node("SPQuantizeFP8", scheme=scheme, skip=skip)


def told(server: ComfyServer, since: int) -> list[tuple[str, int, float, float]]:
    """(why and what, layers, MiB before, MiB after) of each text on a node since then."""
    texts = [event.data["bytes"].decode(errors="replace") for event in server.events(TEXT_EVENT, since=since)]
    pattern = r"FP8 Quantize \(SP\): (.*): (\d+) layers quantised.* ([\d.,]+) MiB before, ([\d.,]+) MiB after"
    found = [re.search(pattern, text) for text in texts]
    return [(match[1], int(match[2]), float(match[3]), float(match[4])) for match in found if match]


@pytest.mark.slow
def test_fp8_is_close_and_told_takes_loras_and_leaves_no_trace(server: ComfyServer) -> None:
    def run(*nodes: ModelNode) -> torch.Tensor:
        return sample_anew(server, Setting(**{**vars(BASE), "model_nodes": nodes}), TWO)

    plain, with_lora = run(), run(lora("flux_diffusers"))
    workers, start, logged = server.workers(), server.mark(), len(server.log())
    quantised = run(fp8())
    ((what, layers, before, after),) = told(server, start)
    assert what == "weight_only (chosen because cpu: CPUs do not compute in FP8)"
    assert layers == 10 and after < 0.7 * before
    assert f"MiB before, {after} MiB after" in server.log()[logged:]
    assert 1e-4 < (quantised - plain).norm() / plain.norm() <= 0.05
    patched = run(lora("flux_diffusers"), fp8("weight_only"))
    assert 1e-4 < (patched - with_lora).norm() / with_lora.norm() <= 0.05
    assert relative_difference(patched, quantised) > 1e-2
    assert torch.equal(run(fp8("weight_only"), lora("flux_diffusers")), patched), "the LoRA behind the node"
    assert torch.equal(run(fp8("weight_only"), lora("flux_diffusers", 0.0)), quantised)
    assert torch.equal(run(fp8("weight_only", "single_blocks, double_blocks")), plain)
    assert torch.equal(run(lora("flux_diffusers")), with_lora)
    assert torch.equal(run(), plain)
    assert server.workers() == workers


def test_comfyui_counts_the_smaller_size(server: ComfyServer) -> None:
    builder = GraphBuilder()
    model = builder.add_loader(FLUX, TWO)
    quantised = builder.add("SPQuantizeFP8", model=model, scheme="auto", skip="")
    part = builder.add("SPQuantizeFP8", model=model, scheme="auto", skip="single_blocks")
    for name, link in {"plain": model, "part": part, "quantised": quantised}.items():
        builder.add("SPTestModelSize", node_id=name, model=link)
    result = server.run(builder.graph)
    assert result.status == "success", result.message
    sizes = {name: result.outputs[name]["bytes"][0] for name in ("plain", "part", "quantised")}
    assert 10**6 < sizes["quantised"] < sizes["part"] < sizes["plain"]
    assert sizes["quantised"] < 0.7 * sizes["plain"]


@pytest.mark.parametrize(
    ("nodes", "swapped", "said"),
    [
        ((fp8(),), None, "works on the MODEL of Load Diffusion Model (SP) or Load Checkpoint (SP) only"),
        ((fp8(), fp8()), TWO, "chain twice"),
        ((fp8("dynamic_rowwise"),), TWO, "scheme is 'dynamic_rowwise', which does not work on cpu"),
        ((fp8(skip="img_mpl"),), TWO, "skip has the pattern 'img_mpl', which fits no linear layer"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_the_node(
    server: ComfyServer, nodes: tuple[ModelNode, ...], swapped: Swapped | None, said: str
) -> None:
    result = server.run(sampling_graph(fresh(BASE, model_nodes=nodes), swapped))
    assert (result.status, result.node_type) == ("error", "SPQuantizeFP8")
    assert said in result.message
    sample(server, fresh(BASE), TWO)  # goes on working
