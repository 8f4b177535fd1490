"""The parallel VAE nodes: ComfyUI's own result, and what a user notices besides it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.comfyui.fixtures import ServerFactory, require_pack
from tests.comfyui.graphs import OUTPUT, Arrange, Graph, GraphBuilder, Link, Setting, Swapped, fresh
from tests.comfyui.installation import REPOSITORY, Installation
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import COGVIDEOX_I2V
from tests.comfyui.processes import Process, is_loopback, listening_addresses, total_resident_bytes, wait_until
from tests.comfyui.server import ComfyServer, PromptResult

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

DECODE, ENCODE = "VAEDecodeTiled", "VAEEncodeTiled"
SMALL = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
"""Several tiles along each axis of small videos."""
WIDE = SMALL | {"overlap": 32}
APART = SMALL | {"overlap": 0}
PADDED = SMALL | {"tile_size": 128, "overlap": 32}
"""For LTX-Video, which pads by reflection: no tile may be one latent wide."""
TWO, THREE, UNEQUAL = "cpu,cpu", "cpu,cpu,cpu", "cpu*3,cpu"


ANY_NODE, ONE_TILE = "any node", "any node, one tile"


def case(
    kind: str,
    node: str,
    shape: list[int],
    devices: list[str],
    inputs: dict[str, int] = SMALL,
    through: str = "parallel node",
) -> dict:
    """`through` any node: VAE Decode or VAE Encode with the VAE of VAE (Parallel)."""
    return {"kind": kind, "node": node, "shape": shape, "devices": devices, "inputs": inputs, "through": through}


TABLE = [
    case("wan_2_1", DECODE, [1, 16, 3, 11, 18], [TWO, UNEQUAL], WIDE),
    case("wan_2_1", DECODE, [2, 16, 2, 8, 8], [TWO]),  # one tile
    case("wan_2_1", ENCODE, [9, 72, 56, 3], [TWO], SMALL, ANY_NODE),
    case("flux", DECODE, [2, 16, 9, 13], [TWO]),
    case("flux", ENCODE, [2, 64, 56, 3], [TWO], SMALL, ONE_TILE),
    case("ltx_2", DECODE, [1, 128, 3, 6, 5], [TWO], PADDED),  # its file says how it is made
]
LARGE = [
    case("wan_2_1", DECODE, [1, 16, 5, 13, 18], ["cpu", TWO, THREE, UNEQUAL], WIDE),
    case("wan_2_1", DECODE, [2, 16, 3, 11, 18], [TWO]),
    case("wan_2_1", DECODE, [1, 16, 2, 16, 24], [TWO, THREE], APART),
    case("wan_2_1", DECODE, [2, 16, 3, 11, 18], [TWO], SMALL, ANY_NODE),
    case("wan_2_1", DECODE, [2, 16, 2, 8, 7], [TWO], SMALL, ONE_TILE),
    case("wan_2_1", ENCODE, [5, 64, 48, 3], [TWO], SMALL, ONE_TILE),
    case("wan_2_1", ENCODE, [17, 104, 152, 3], [TWO, THREE], WIDE),
    case("flux", DECODE, [1, 16, 9, 13], [TWO], SMALL, ANY_NODE),
    case("flux", DECODE, [2, 16, 9, 13], [THREE]),
    case("flux", ENCODE, [2, 76, 100, 3], [TWO]),
    case("hunyuan_video", DECODE, [1, 16, 3, 8, 9], [TWO]),  # it has one size only, and takes seconds a tile
    case("hunyuan_video", ENCODE, [9, 72, 64, 3], [TWO]),
    case("cogvideox", DECODE, [1, 16, 3, 8, 9], [TWO]),
    case("cogvideox", ENCODE, [9, 72, 64, 3], [TWO]),
    case("cogvideox", ENCODE, [1, 72, 64, 3], [TWO], SMALL, ANY_NODE),
]
# As a node that changes the network in place leaves it.
CHANGED = case("wan_2_1", DECODE, [1, 16, 2, 9, 9], [TWO, TWO]) | {"changed": {"scale_of_another_node": 2}}

# As LTX-Video's: each tile is decoded from its own random numbers.
NOISY = case("wan_2_1", DECODE, [1, 16, 2, 9, 9], [TWO]) | {"changed": {"timestep_conditioning": True}}


@pytest.fixture(scope="module")
def compared(installation: Installation) -> dict[str, list[dict]]:
    """One process, and one set of workers, for all cases: each imports ComfyUI."""
    kinds = [case["kind"] for case in TABLE]
    found = run(installation, [*TABLE, NOISY, CHANGED])
    results = {kind: [result for of, result in zip(kinds, found, strict=False) if of == kind] for kind in kinds}
    return results | {"noisy": [found[-2]], "changed": [found[-1]]}


@pytest.mark.parametrize("kind", ["wan_2_1", "flux", "ltx_2"])
@pytest.mark.timeout(900)  # for what all of them share
def test_the_result_is_the_native_one_bit_for_bit(compared: dict[str, list[dict]], kind: str) -> None:
    check([case for case in TABLE if case["kind"] == kind], compared[kind])


@pytest.mark.timeout(900)
def test_a_vae_that_workers_would_build_otherwise_is_run_natively(compared: dict[str, list[dict]]) -> None:
    """Both times, the second one without asking the workers."""
    found = compared["changed"][0]["results"][TWO]
    assert found["equal"]
    complaint = "Computed natively.*?would build another VAE.*?scale_of_another_node=2"
    assert len(re.findall(complaint, found["told"])) == 2, found["told"]


@pytest.mark.timeout(900)
def test_a_vae_that_adds_noise_is_run_natively(compared: dict[str, list[dict]]) -> None:
    found = compared["noisy"][0]["results"][TWO]
    assert found["equal"]
    assert "Computed natively, on one device: this VAE adds random noise" in found["told"]


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_the_result_of_large_networks_is_the_native_one_bit_for_bit(installation: Installation) -> None:
    check(LARGE, run(installation, LARGE))


@pytest.mark.extended
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "cases",
    [
        [case("wan_2_2", DECODE, [1, 48, 2, 5, 4], [TWO]), case("wan_2_2", ENCODE, [5, 80, 64, 3], [TWO])],
        [case("mochi", DECODE, [1, 12, 2, 9, 8], [TWO]), case("mochi", ENCODE, [7, 72, 64, 3], [TWO])],
        [case("ltxv", DECODE, [1, 128, 2, 7, 4], [TWO], PADDED), case("ltxv", ENCODE, [9, 224, 128, 3], [TWO], PADDED)],
        [case("flux2", DECODE, [1, 128, 5, 4], [TWO]), case("flux2", ENCODE, [1, 80, 64, 3], [TWO])],
    ],
    ids=["wan_2_2", "mochi", "ltxv", "flux2"],
)
def test_the_other_families_networks(installation: Installation, cases: list[dict]) -> None:
    check(cases, run(installation, cases))


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_a_start_image_for_hunyuan_video_1_5(installation: Installation) -> None:
    """1.2 billion parameters; ComfyUI has no smaller one."""
    cases = [
        case("hunyuan_video_15", ENCODE, [1, 96, 64, 3], [TWO], SMALL, ANY_NODE),
        case("hunyuan_video_15", DECODE, [1, 32, 2, 5, 4], [TWO], SMALL, ANY_NODE),
    ]
    check(cases, run(installation, cases))


@pytest.mark.extended
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["hunyuan_video", "cogvideox"])
def test_large_networks_on_more_workers_and_in_batches(installation: Installation, kind: str) -> None:
    """Minutes each: these networks have one size only."""
    cases = [case(kind, DECODE, [2, 16, 3, 9, 13], [TWO, THREE]), case(kind, ENCODE, [9, 72, 100, 3], [THREE])]
    check(cases, run(installation, cases))


def run(installation: Installation, cases: list[dict]) -> list[dict]:
    """What the script found, for each case."""
    script = Path(__file__).with_name("vae_against_native.py")
    done = subprocess.run(
        [installation.python, script, installation.path, REPOSITORY, json.dumps(cases)],
        capture_output=True, text=True, timeout=1500, cwd=installation.path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases)
    return results


def check(cases: list[dict], results: list[dict]) -> None:
    for given, result in zip(cases, results, strict=True):
        assert result["finite"], f"{given}: the native result is no test"
        for devices in given["devices"]:
            found = result["results"][devices]
            assert found["equal"], f"{given['kind']} {given['node']} {given['shape']} differs on {devices}"
            if given["inputs"] == APART:
                assert found["bytes_back"] == result["nbytes"], "each pixel is to come back once"
            expected = "there is only one device, cpu" if devices == "cpu" else rf"\d+ tiles? on {re.escape(devices)} "
            if given["through"] == ONE_TILE:
                expected = "^$"  # as without the pack
            assert re.search(expected, found["told"]), found["told"]


# --- in a graph -------------------------------------------------------------------------------------------------------

LONG_FRAMES = 101  # a minute and more; nobody waits for its end
_seeds = iter(range(1000, 2000))


def decode_graph(
    node: str,
    devices: str | None = None,
    *,
    seed: int = 0,
    frames: int = 5,
    vae: str = "wan_2_1",
    on_failure: str = "error",
) -> Graph:
    builder = GraphBuilder()
    latent = builder.add("SPTestVideoLatent", seed=seed, frames=frames, height=13, width=18)
    network = builder.add("SPTestRandomVAE", kind=vae, seed=0)
    inputs: dict = {"samples": latent, "vae": network, **WIDE}
    if devices is not None:
        inputs["sp_config"] = builder.add("SPConfig", **vars(Swapped(devices=devices, on_failure=on_failure)))
    images = builder.add(node, node_id="vae", **inputs)
    builder.add("SaveLatent", OUTPUT, samples=builder.add("SPTestAsLatent", value=images), filename_prefix="vae")
    return builder.graph


def decode(server: ComfyServer, node: str, devices: str | None = None, seed: int = 0) -> torch.Tensor:
    return read_latent(server, server.run(decode_graph(node, devices, seed=seed)))


def start_long_decode(server: ComfyServer) -> str:
    """Queue a decode of many tiles; return in the middle of it."""
    return decode_until_some_tiles(server, decode_graph("SPVAEDecode", TWO, seed=next(_seeds), frames=LONG_FRAMES))


def decode_until_some_tiles(server: ComfyServer, graph: Graph) -> str:
    """Queue the graph; return when some of its tiles are decoded."""
    prompt_id = server.queue(graph)
    assert isinstance(prompt_id, str), prompt_id
    server.wait_for_event(
        lambda event: event.kind == "progress" and event.data.get("node") == "vae" and event.data["value"] >= 4,
        prompt_id, timeout=90,
    )  # fmt: skip
    return prompt_id


def test_decode_and_encode_equal_the_native_nodes(server: ComfyServer) -> None:
    expected = decode(server, DECODE)
    start = server.mark()
    assert torch.equal(decode(server, "SPVAEDecode", TWO), expected)
    progress = [e.data for e in server.events("progress", since=start) if e.data["node"] == "vae"]
    assert progress[-1]["value"] == progress[-1]["max"] == 24, "the bar is to count tiles"
    workers = server.workers()
    assert torch.equal(decode(server, "SPVAEDecode", TWO, seed=1), decode(server, DECODE, seed=1))
    assert server.workers() == workers, "the second prompt started other workers"


def test_workers_of_the_diffusion_model_are_used(server: ComfyServer) -> None:
    """Without SP Config on the VAE node."""
    sample(server, fresh(Setting()), Swapped(devices=TWO))
    workers = server.workers()
    start = len(server.log())
    assert torch.equal(decode(server, "SPVAEDecode", seed=2), decode(server, DECODE, seed=2))
    assert re.search(r"24 tiles on cpu,cpu in", server.log()[start:])
    assert server.workers() == workers


def test_nothing_listens_beyond_this_machine_between_tiles(server: ComfyServer) -> None:
    prompt_id = start_long_decode(server)
    workers = server.workers()
    addresses = listening_addresses([server.pid, *(worker.pid for worker in workers)])
    server.interrupt()
    assert server.wait(prompt_id).status == "interrupted", "it was over before anybody looked"
    assert len(workers) == 2 and len(addresses) > 1, addresses
    assert all(is_loopback(address) for address, _ in addresses), addresses


def test_cancel_stops_between_tiles(server: ComfyServer) -> None:
    decode(server, "SPVAEDecode", TWO)
    workers = server.workers()
    prompt_id = start_long_decode(server)
    server.interrupt()
    assert server.wait(prompt_id).status == "interrupted"
    assert torch.equal(decode(server, "SPVAEDecode", TWO, seed=3), decode(server, DECODE, seed=3))
    assert server.workers() == workers, "Cancel cost the workers"


@pytest.mark.extended
def test_a_killed_worker_is_named_and_the_next_prompt_works(server: ComfyServer) -> None:
    decode(server, "SPVAEDecode", TWO)
    prompt_id = start_long_decode(server)
    victim: Process = server.workers()[-1]
    victim.kill()
    result: PromptResult = server.wait(prompt_id)
    assert result.status == "error"
    assert re.search(r"worker rank [01] \(cpu, pid \d+\) was ended by SIGKILL during 'tile'", result.message)
    assert torch.equal(decode(server, "SPVAEDecode", TWO, seed=4), decode(server, DECODE, seed=4))


def test_the_tiles_of_a_killed_worker_are_decoded_again(server: ComfyServer) -> None:
    frames, seed = 13, next(_seeds)
    expected = read_latent(server, server.run(decode_graph("SPVAEDecode", TWO, seed=seed, frames=frames)))
    server.free()  # not from ComfyUI's cache
    prompt_id = decode_until_some_tiles(
        server, decode_graph("SPVAEDecode", TWO, seed=seed, frames=frames, on_failure="retry")
    )
    before = server.mark()
    server.workers()[-1].kill()
    assert torch.equal(read_latent(server, server.wait(prompt_id)), expected)
    kinds = [event.data["kind"] for event in server.events("sequence_parallel.event", since=before)]
    assert kinds == ["crashed", "retried", "started"]


@pytest.mark.extended
def test_free_drops_the_weights_in_the_workers(server: ComfyServer) -> None:
    graph = decode_graph("SPVAEDecode", TWO, seed=5, vae="hunyuan_video", frames=1)
    first = read_latent(server, server.run(graph, timeout=300))
    before = total_resident_bytes(server.workers())
    server.free()
    weights = 246_000_000 * 4
    assert wait_until(lambda: before - total_resident_bytes(server.workers()) > 0.9 * weights, timeout=20)
    assert torch.equal(read_latent(server, server.run(graph, timeout=300)), first)
    server.free()


@pytest.mark.extended
def test_without_workers_it_is_decoded_natively_and_said_so(start_server: ServerFactory) -> None:
    with start_server() as server:
        require_pack(server)
        start = server.mark()
        assert torch.equal(decode(server, "SPVAEDecode"), decode(server, DECODE))
        assert not server.workers(), "workers were started without being asked for"
        shown = [e.data["bytes"].decode(errors="replace") for e in server.events(since=start) if "bytes" in e.data]
        assert any("Computed natively, on one device: " in text for text in shown), shown


def test_overlap_as_large_as_the_tile_is_refused(server: ComfyServer) -> None:
    builder = GraphBuilder()
    picture = builder.add("EmptyImage", width=96, height=64, batch_size=1, color=0)
    vae = builder.add("SPTestRandomVAE", kind="flux", seed=0)
    latent = builder.add("SPVAEEncode", pixels=picture, vae=vae, **(WIDE | {"overlap": 32}))
    builder.add("SaveLatent", OUTPUT, samples=latent, filename_prefix="vae")
    result = server.run(builder.graph)
    assert result.status == "error"
    assert "overlap is 32; with tile_size 64 it must be less than 32" in result.message


# --- for any node -----------------------------------------------------------------------------------------------------


def test_image_to_video_encodes_on_all_devices(server: ComfyServer) -> None:
    """Wan Image To Video encodes by itself, through the VAE that it is given."""

    def with_start_image(vae_node: str, color: int) -> Arrange:
        def arrange(builder: GraphBuilder, setting: Setting, positive: Link, _: Link) -> tuple[Link, Link]:
            config = {"sp_config": builder.add("SPConfig", **vars(Swapped()))} if vae_node == "SPVAE" else {}
            vae = builder.add("SPTestRandomVAE", kind="wan_2_1", seed=0)
            vae = builder.add(vae_node, vae=vae, **SMALL, **config)
            size = {"width": setting.width, "height": setting.height, "length": setting.length, "batch_size": 1}
            image = builder.add("EmptyImage", width=72, height=72, batch_size=1, color=color)
            texts = {"positive": positive, "negative": positive}
            node, _ = builder.add("WanImageToVideo", vae=vae, start_image=image, **texts, **size)
            return [node, 0], [node, 2]

        return arrange

    setting = Setting(checkpoint=COGVIDEOX_I2V, width=80, height=72, length=5)
    native = replace(setting, arrange=with_start_image("SPTestTiledVAE", 0xC08040))
    expected = sample(server, native)
    start = len(server.log())
    actual = sample(server, replace(setting, arrange=with_start_image("SPVAE", 0xC08040)), Swapped())
    assert re.search(r"\d+ tiles? on cpu,cpu in", server.log()[start:])
    assert relative_difference(actual, expected) <= 1e-4
    other = sample(server, replace(setting, arrange=with_start_image("SPVAE", 0x204080)), Swapped())
    assert relative_difference(other, expected) > 1e-2, "the start image makes no difference"
