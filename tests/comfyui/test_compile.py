"""Torch Compile (SP) in a live server: the same latent, what is told, what is refused."""

from __future__ import annotations

import shutil

import pytest

from tests.comfyui.graphs import GraphBuilder, Setting, Swapped, Text, add_sampling, fresh, model_node, sampling_graph
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import WAN
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
COMPILE = model_node("SPTorchCompile", mode="default", dynamic=True)
TEXT = Text(width=4096)
NAME = "Torch Compile (SP): "


def told(server: ComfyServer, since: int) -> list[str]:
    """The node's texts since then."""
    texts = [event.data["bytes"].decode(errors="replace") for event in server.events("binary 3", since=since)]
    return [NAME + text.partition(NAME)[2] for text in texts if NAME in text]


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_compiled_and_uncompiled_models_of_one_loader_agree_with_the_native_one(server: ComfyServer) -> None:
    setting = fresh(Setting(checkpoint=WAN, positive=TEXT, negative=TEXT))
    native = sample(server, setting)
    builder = GraphBuilder()
    model = builder.add_loader(setting.checkpoint, TWO)
    node, inputs = COMPILE
    add_sampling(builder, setting, builder.add(node, model=model, **dict(inputs)), "compiled")
    add_sampling(builder, setting, model, "plain")
    start, logged = server.mark(), len(server.log())
    result = server.run(builder.graph, timeout=840)
    compiled, plain = read_latent(server, result, "compiled"), read_latent(server, result, "plain")
    assert relative_difference(plain, native) <= 1e-4
    assert 0 < relative_difference(compiled, plain) <= 1e-4
    (text,) = told(server, start)
    assert text.startswith(NAME + "1 kind of blocks, 1 graph compiled in ")
    assert text.endswith("0 graph breaks, 0 recompilations")
    assert text in server.log()[logged:]
    assert server.log()[logged:].count("MiB on each of 2 workers") == 1, "both use the same weights"
    folder = server.base / "cache" / "sequence-parallel" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700 and any(folder.iterdir())

    start = server.mark()
    sample(server, fresh(Setting(checkpoint=WAN, positive=TEXT, negative=TEXT, model_nodes=(COMPILE,))), TWO)
    assert told(server, start) == [NAME + "1 kind of blocks, compiled before"]


@pytest.mark.parametrize(
    ("nodes", "swapped", "message"),
    [
        (
            (COMPILE,),
            None,
            "Torch Compile (SP) works on the MODEL of Load Diffusion Model (SP) or Load Checkpoint (SP) only",
        ),
        ((COMPILE, COMPILE), TWO, "this MODEL has gone through Torch Compile (SP) already"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    server: ComfyServer, nodes: tuple, swapped: Swapped | None, message: str
) -> None:
    result = server.run(sampling_graph(fresh(Setting(model_nodes=nodes)), swapped))
    assert result.status == "error" and message in result.message


def test_the_native_node_runs_and_the_log_names_this_one(server: ComfyServer) -> None:
    logged = len(server.log())
    native = model_node("TorchCompileModel", backend="inductor")
    sample(server, fresh(Setting(model_nodes=(native,))), TWO)
    assert (
        "TorchCompileModel changes nothing with Load Diffusion Model (SP) or Load Checkpoint (SP); use Torch"
        in (server.log()[logged:])
    )
