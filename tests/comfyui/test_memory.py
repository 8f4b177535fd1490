"""Memory over a day of work, told in twenty prompts."""

import time

import pytest

from tests.comfyui.fixtures import ServerFactory, require_pack
from tests.comfyui.graphs import Setting, Swapped, fresh
from tests.comfyui.latents import sample
from tests.comfyui.model_files import DEEP, FLUX
from tests.comfyui.processes import total_resident_bytes, wait_until
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
FAMILIES = [
    Setting(checkpoint=DEEP, width=128, height=128, length=9),
    Setting(checkpoint=FLUX, width=512, height=512, picture=True),
]


def resident_bytes(server: ComfyServer) -> tuple[int, int]:
    """Of the server and of all workers."""
    return server.process.resident_bytes, total_resident_bytes(server.workers())


@pytest.mark.slow
@pytest.mark.extended
def test_alternating_families_neither_leak_nor_keep_their_memory(start_server: ServerFactory) -> None:
    with start_server() as server:
        require_pack(server)

        def prompts(count: int) -> None:
            for number in range(count):
                sample(server, fresh(FAMILIES[number % 2]), TWO)

        prompts(2)
        server.free()
        time.sleep(2)
        _, idle = resident_bytes(server)
        prompts(4)
        early = resident_bytes(server)
        prompts(16)
        late = resident_bytes(server)
        for who, before, after in zip(("server", "workers"), early, late, strict=True):
            print(f"{who}: {before / 2**20:.0f} MiB after 4 prompts, {after / 2**20:.0f} MiB after 20")
            assert after <= 1.05 * before, who
        sample(server, fresh(FAMILIES[0]), TWO)
        assert resident_bytes(server)[1] > 1.1 * idle, "the weights are too small to be seen"
        server.free()
        assert wait_until(lambda: resident_bytes(server)[1] <= 1.05 * idle, timeout=20)
        print(f"workers: {idle / 2**20:.0f} MiB idle, {resident_bytes(server)[1] / 2**20:.0f} MiB after /free")
