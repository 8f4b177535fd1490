"""Load Checkpoint (SP) against Load Checkpoint."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comfyui.fixtures import Reference
from tests.comfyui.graphs import OUTPUT, GraphBuilder, Link, Setting, Swapped, Text, fresh, sampling_graph, with_audio
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import LTX23_LARGE, LTX23_WHOLE, SDXL, SDXL_WHOLE
from tests.comfyui.server import ComfyServer, Graph

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-4
"""Relative, after the steps of a sampling with CFG."""
ONE, TWO = Swapped("cpu"), Swapped("cpu,cpu")
CASES = {
    "sdxl": Setting(
        checkpoint=SDXL, whole=True, picture=True, empty_picture="EmptyLatentImage", cfg=4.0, batch=2,
        positive=Text(tokens=9), negative=Text(seed=12, tokens=9),
    ),
    "ltx_2.3": Setting(
        checkpoint=LTX23_WHOLE, whole=True, empty="EmptyLTXVLatentVideo", audio=True, width=160, height=96, length=17,
        cfg=4.0, arrange=with_audio, positive=Text(width=192, valid=6), negative=Text(seed=12, tokens=5, width=192),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_samples_as_load_checkpoints(
    server: ComfyServer, reference: Reference, name: str, swapped: Swapped
) -> None:
    latent = sample(server, CASES[name], swapped)
    assert relative_difference(latent, reference(CASES[name])) <= TOLERANCE


def test_what_lies_beside_the_network_decides_how_it_is_sampled(server: ComfyServer, reference: Reference) -> None:
    """The file says that the network predicts v; Load Diffusion Model takes that for noise."""
    setting = CASES["sdxl"]
    path = server.models / "checkpoints" / SDXL
    (server.models / "diffusion_models" / SDXL).unlink(missing_ok=True)
    (server.models / "diffusion_models" / SDXL).symlink_to(path)
    as_noise = reference(replace(setting, whole=False))
    assert relative_difference(reference(setting), as_noise) > 0.1
    assert relative_difference(sample(server, replace(setting, whole=False), TWO), as_noise) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 1},  # both prompts in one call
        {"batch": 1, "negative": Text(seed=12, tokens=5)},  # of other lengths: one call each
        {"batch": 2, "cfg": 1.0},
    ],
    ids=["prompts", "unequal prompts", "pictures"],
)
def test_without_a_plan_prompts_and_pictures_run_side_by_side(
    server: ComfyServer, reference: Reference, changes: dict[str, Any]
) -> None:
    setting = replace(CASES["sdxl"], **changes)
    assert relative_difference(sample(server, setting, TWO), reference(setting)) <= TOLERANCE
    before = {worker: worker.cpu_seconds for worker in server.workers()}
    sample(server, fresh(setting, steps=6), TWO)
    worked = [worker.cpu_seconds - before[worker] for worker in server.workers()]
    assert len(worked) == 2 and min(worked) > 0.5 * max(worked), worked


@pytest.mark.parametrize("name", CASES)
def test_the_vae_is_load_checkpoints(server: ComfyServer, name: str) -> None:
    encoded = [encode(server, CASES[name].checkpoint, swapped) for swapped in (None, TWO)]
    assert torch.equal(*encoded)


def encode(server: ComfyServer, checkpoint: str, swapped: Swapped | None) -> torch.Tensor:
    """A grey picture, by the VAE of a checkpoint."""
    builder = GraphBuilder()
    loader, _ = builder.add_whole_loader(checkpoint, swapped)
    picture = builder.add("EmptyImage", width=64, height=64, batch_size=1, color=0x808080)
    latent = builder.add("VAEEncode", pixels=picture, vae=[loader, 2])
    builder.add("SaveLatent", node_id="latent", samples=latent, filename_prefix="latents/test")
    return read_latent(server, server.run(builder.graph))


def test_the_text_is_encoded_as_by_load_checkpoint(server: ComfyServer) -> None:
    """By both of SDXL's encoders: their states side by side, and the pooled text of the second one."""

    def encoded(text: str, swapped: Swapped | None) -> torch.Tensor:
        builder = GraphBuilder()
        loader, _ = builder.add_whole_loader(SDXL_WHOLE, swapped)
        save(builder, OUTPUT, builder.add("CLIPTextEncode", clip=[loader, 1], text=text))
        return read_latent(server, server.run(builder.graph))

    native = encoded("a small boat", None)
    assert native.numel() == 77 * 64 + 40 and native.abs().max() > 0.1
    assert torch.equal(encoded("a small boat", TWO), native)
    assert not torch.equal(encoded("a large boat", TWO), native)


def test_a_checkpoint_without_a_text_encoder_gives_none_as_load_checkpoint(server: ComfyServer) -> None:
    """LTX-2.3's has the projection only; Load LTXV Audio Text Encoder takes it from there."""
    messages = []
    for swapped in (None, TWO):
        builder = GraphBuilder()
        loader, _ = builder.add_whole_loader(LTX23_WHOLE, swapped)
        save(builder, OUTPUT, builder.add("CLIPTextEncode", clip=[loader, 1], text="a small boat"))
        result = server.run(builder.graph)
        assert result.status == "error" and result.node_type == "CLIPTextEncode"
        messages.append(result.message)
    assert messages[0] == messages[1] and "clip input is invalid: None" in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["sdxl", "ltx_2.3"])
def test_from_text_to_pictures_and_sound(server: ComfyServer, graph: str) -> None:
    """All that a checkpoint gives in one graph: what is seen and heard at the end."""
    make = {"sdxl": picture_graph, "ltx_2.3": film_graph}[graph]
    ends = []
    for swapped in (None, TWO):
        result = server.run(make(swapped))
        ends.append({output: read_latent(server, result, output) for output in result.outputs})
    native, parallel = ends
    assert native.keys() == parallel.keys()
    for output, expected in native.items():
        assert expected.std() > 1e-3, f"{output} is empty"
        assert relative_difference(parallel[output], expected) <= TOLERANCE, output


def picture_graph(swapped: Swapped | None) -> Graph:
    """Text, a batch of two, CFG, pictures."""
    builder = GraphBuilder()
    loader, _ = builder.add_whole_loader(SDXL_WHOLE, swapped)
    positive, negative = (
        builder.add("CLIPTextEncode", clip=[loader, 1], text=text) for text in ("a small boat", "blurry")
    )
    latent = builder.add("EmptyLatentImage", width=64, height=48, batch_size=2)
    samples = sampler(builder, [loader, 0], positive, negative, latent)
    save(builder, "pictures", builder.add("VAEDecode", samples=samples, vae=[loader, 2]))
    return builder.graph


def film_graph(swapped: Swapped | None) -> Graph:
    """Video and sound of one sampling, decoded by the two VAEs of the file; the sound goes through the vocoder."""
    builder, setting = GraphBuilder(), CASES["ltx_2.3"]
    loader, _ = builder.add_whole_loader(LTX23_WHOLE, swapped)
    sound_vae = builder.add("LTXVAudioVAELoader", ckpt_name=LTX23_WHOLE)
    positive, negative = builder.add_text(setting.positive), builder.add_text(setting.negative)
    video = builder.add("EmptyLTXVLatentVideo", width=160, height=96, length=17, batch_size=1)
    sound = builder.add("LTXVEmptyLatentAudio", frames_number=17, frame_rate=25, batch_size=1, audio_vae=sound_vae)
    both = builder.add("LTXVConcatAVLatent", video_latent=video, audio_latent=sound)
    samples = sampler(builder, [loader, 0], positive, negative, both)
    parts, _ = builder.add("LTXVSeparateAVLatent", av_latent=samples)
    save(builder, "pictures", builder.add("VAEDecode", samples=[parts, 0], vae=[loader, 2]))
    save(builder, "sound", builder.add("LTXVAudioVAEDecode", samples=[parts, 1], audio_vae=sound_vae))
    return builder.graph


def sampler(builder: GraphBuilder, model: Link, positive: Link, negative: Link, latent: Link) -> Link:
    return builder.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=7, steps=3, cfg=4.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip


def save(builder: GraphBuilder, output: str, value: Link) -> None:
    """Pictures, sound or conditioning, for `read_latent`."""
    samples = builder.add("SPTestAsLatent", value=value)
    builder.add("SaveLatent", node_id=output, samples=samples, filename_prefix="latents/test")


@pytest.mark.slow
def test_comfyui_holds_no_weight_of_the_network(server: ComfyServer) -> None:
    """Load Checkpoint takes the network's 480 MiB into ComfyUI's memory; with the pack they are in the workers only."""
    file = server.models / "checkpoints" / LTX23_LARGE
    network = network_bytes(file)
    assert network > 400 << 20
    start = memory(server, memory_graph(LTX23_WHOLE, TWO, file))
    told = {
        "loaded": memory(server, memory_graph(LTX23_LARGE, TWO, file)),
        "sampled": memory(server, memory_graph(LTX23_LARGE, TWO, file, sampled=True)),
        "natively loaded": memory(server, memory_graph(LTX23_LARGE, None, file)),
    }
    more = {what: {name: found[name] - start[name] for name in found} for what, found in told.items()}
    print(f"\nThe network has {network / 2**20:.1f} MiB. More in ComfyUI's process than with a tiny checkpoint:")
    for what, found in more.items():
        print(f"{what}: " + ", ".join(f"{name} {count / 2**20:.1f} MiB" for name, count in found.items()))
    native = more.pop("natively loaded")
    for found in more.values():
        assert max(found.values()) < 0.05 * network, found
    seen = min(native[name] for name in ("Private_Dirty", "Anonymous", "tensors"))
    assert seen > 0.75 * network, "nothing is measured"  # what others leave free meanwhile hides a part


def memory_graph(checkpoint: str, swapped: Swapped | None, file: Path, *, sampled: bool = False) -> Graph:
    """Says what ComfyUI's process holds while there is the MODEL, after a sampling or before."""
    builder = GraphBuilder()
    loader, _ = builder.add_whole_loader(checkpoint, swapped)
    text = builder.add_text(Text(width=1536))
    video = builder.add("EmptyLTXVLatentVideo", width=64, height=64, length=9, batch_size=1)
    _, latent = with_audio(builder, CASES["ltx_2.3"], text, video)
    if sampled:
        latent = sampler(builder, [loader, 0], text, text, latent)
    builder.add("SPTestHeldMemory", node_id="tell", model=[loader, 0], after=latent, file=str(file.resolve()))
    return builder.graph


def memory(server: ComfyServer, graph: Graph) -> dict[str, int]:
    result = server.run(graph)
    assert result.status == "success", result.message
    return {name: value for name, (value,) in result.outputs["tell"].items()}


def network_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    spans = (tensor["data_offsets"] for name, tensor in header.items() if name.startswith("model.diffusion_model."))
    return sum(end - start for start, end in spans)


def test_a_degree_that_needs_a_plan_is_refused_for_a_unet(server: ComfyServer) -> None:
    workers = set(server.workers())
    result = server.run(sampling_graph(CASES["sdxl"], replace(TWO, ulysses_degree=2)))
    assert result.status == "error"
    assert "ulysses_degree is 2, but UNetModel has no split plan" in result.message
    assert not set(server.workers()) - workers
