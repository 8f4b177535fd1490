"""Where weights go: what `auto` makes of the free memory, and what ComfyUI is told of it beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.errors import ConfigError
from parallel.placement import Memory, bytes_on_device, check_host_memory, choose, next_smaller
from parallel.worker.free_memory import host_memory

GIB = 2**30
LARGE_HOST = Memory(free=200 * GIB, total=256 * GIB)


def gpus(*free: float, total: float = 24) -> list[Memory]:
    return [Memory(free=int(gib * GIB), total=int(total * GIB)) for gib in free]


def test_an_offload_that_the_host_has_no_room_for_is_refused():
    host = Memory(free=30 * GIB, total=32 * GIB)
    check_host_memory(26 * GIB, host, "as asked")
    with pytest.raises(ConfigError, match=r"weights 'offload' \(as asked\) needs 40 GiB.*30 GiB are free"):
        check_host_memory(40 * GIB, host, "as asked")


# A 24 GB card has 24 − 1 − 2.4 for weights when it is empty.
@pytest.mark.parametrize(
    ("size", "devices", "sharing", "mode", "why"),
    [
        pytest.param(12, gpus(24), 1, "replicate", "12 GiB fit, rank 0 has 20.6 GiB", id="fits"),
        pytest.param(26, gpus(24), 1, "offload", "26 GiB do not fit: rank 0 has 20.6 GiB", id="one GPU"),
        pytest.param(26, gpus(80, 80, total=80), 2, "replicate", "26 GiB fit", id="fits on each"),
        pytest.param(26, gpus(24, 24), 2, "shard", "1/2 of it does: rank 0 has 20.6 GiB", id="two cards"),
        pytest.param(
            26, gpus(24, 20), 2, "offload", "nor does 1/2 of it: rank 1 has 16.6 GiB", id="the fuller decides"
        ),
        pytest.param(26, gpus(24, 24), 1, "offload", "26 GiB do not fit: rank", id="cond and uncond side by side"),
        pytest.param(26, gpus(24, 24, 24, 20), 4, "shard", "1/4 of it does: rank 3 has 16.6 GiB", id="four cards"),
        pytest.param(12, gpus(1), 1, "offload", "rank 0 has 0 GiB for weights", id="no room at all"),
    ],
)
def test_auto_on_gpus(size: int, devices: list[Memory], sharing: int, mode: str, why: str):
    chosen = choose(size * GIB, devices, LARGE_HOST, sharing=sharing, device_type="cuda")
    assert chosen.mode == mode
    assert chosen.reason.startswith("auto: ")
    assert why in chosen.reason


@pytest.mark.parametrize(
    ("sharing", "ran_out", "mode", "why"),
    [
        pytest.param(2, ["replicate"], "shard", "replicate ran out of memory, 1/2 of 12 GiB fits", id="two cards"),
        pytest.param(2, ["shard", "replicate"], "offload", "replicate and shard ran out of memory: rank 0", id="last"),
        pytest.param(1, ["replicate"], "offload", "replicate ran out of memory: rank 0", id="side by side"),
    ],
)
def test_auto_takes_no_mode_again_that_ran_out_of_memory(sharing: int, ran_out: list[str], mode: str, why: str):
    """12 GiB fit on both; what a step needs beside them did not."""
    chosen = choose(12 * GIB, gpus(24, 24), LARGE_HOST, sharing=sharing, device_type="cuda", ran_out=ran_out)
    assert chosen.mode == mode
    assert chosen.reason.startswith(f"auto: {why}")
    assert next_smaller(ran_out[0], 12 * GIB, sharing=sharing, device_type="cuda") == mode


def test_there_is_no_smaller_mode():
    assert next_smaller("offload", 12 * GIB, sharing=2, device_type="cuda") is None
    mapped = {"sharing": 2, "device_type": "cpu", "in_the_file": 12 * GIB}
    assert next_smaller("replicate", 12 * GIB, **mapped) is None, "it is one copy already"


@pytest.mark.parametrize(
    ("free", "mode", "why"),
    [(32, "replicate", "2 × 10 GiB fit"), (24, "offload", "2 × 10 GiB do not fit in 19.8 GiB of memory")],
)
def test_auto_on_cpus(free: int, mode: str, why: str):
    host = Memory(free=free * GIB, total=32 * GIB)
    chosen = choose(10 * GIB, [host, host], host, sharing=2, device_type="cpu")
    assert (chosen.mode, why in chosen.reason) == (mode, True)


@pytest.mark.parametrize(
    ("mode", "device", "share"),
    [("replicate", "cuda", 1), ("auto", "cuda", 1), ("shard", "cuda", 0.25), ("offload", "cuda", 0.15),
     ("offload", "cpu", 1), ("shard", "cpu", 0.25)],
)  # fmt: skip
def test_bytes_that_comfyui_is_to_make_room_for(mode: str, device: str, share: float):
    assert bytes_on_device(mode, 1000, 4, device) == 1000 * share


MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize("folder", [".", "memory"])
@pytest.mark.parametrize(
    ("limit", "free", "total"),
    [("max", 600, 1000), (500 * 1024, 500 - 300 + 40, 500), (10**18, 600, 1000), (200 * 1024, 0, 200)],
)
def test_free_memory_within_a_containers_limit(tmp_path: Path, folder: str, limit: int | str, free: int, total: int):
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    (tmp_path / "meminfo").write_text(MEMINFO)
    version_2 = folder == "."
    (place / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (place / ("memory.current" if version_2 else "memory.usage_in_bytes")).write_text(f"{300 * 1024}\n")
    (place / "memory.stat").write_text(f"anon 5\ninactive_file {30 * 1024}\nactive_file {10 * 1024}\n")
    assert host_memory(tmp_path / "meminfo", tmp_path) == Memory(free=free * 1024, total=total * 1024)


def test_free_memory_of_this_machine():
    memory = host_memory()
    assert 0 < memory.free <= memory.total
