"""What a user notices besides the picture: speed of the second prompt, Cancel, progress, memory, failures."""

import re
import signal
from dataclasses import replace

import pytest

from tests.comfyui.fixtures import ServerFactory, require_pack
from tests.comfyui.graphs import Setting, Swapped, fresh, sampling_graph
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import DEEP, file_bytes
from tests.comfyui.processes import (
    Process,
    gains_cpu,
    is_loopback,
    listening_addresses,
    shared_memory_files,
    shared_memory_in_use,
    total_cpu_seconds,
    total_resident_bytes,
    wait_until,
)
from tests.comfyui.server import ComfyServer
from tests.distributed.faults import Faults
from tests.distributed.faulty_boot import BROKEN, OUT_OF_MEMORY

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
# A step of several seconds, made of 32 blocks of about 0.2 s.
LONG = Setting(checkpoint=DEEP, width=256, height=384, length=33, steps=20)
VISIBLE = Setting(width=256, height=384, length=33, steps=3)


def busy_workers(server: ComfyServer, setting: Setting = VISIBLE, swapped: Swapped = TWO) -> list[Process]:
    """Run a prompt; the workers that computed for it."""
    before = {worker: worker.cpu_seconds for worker in server.workers()}
    sample(server, fresh(setting), swapped)
    return [worker for worker in server.workers() if worker.cpu_seconds - before.get(worker, 0.0) > 0.1]


def start_long_step(server: ComfyServer) -> str:
    """Queue the long setting and return in the middle of a step, with the workers at work."""
    graph = sampling_graph(fresh(LONG), TWO)
    prompt_id = server.queue(graph)
    assert isinstance(prompt_id, str), prompt_id
    server.wait_for_node("KSampler", graph, prompt_id)
    # Starting workers takes CPU time too: wait for them first, and then for a good part of a step.
    assert wait_until(lambda: len(server.workers()) >= 2, timeout=60)
    assert wait_until(lambda: gains_cpu(server.workers(), seconds=1.5), timeout=60)
    return prompt_id


@pytest.mark.slow
def test_second_prompt_uses_the_same_workers(server: ComfyServer) -> None:
    first = busy_workers(server)
    assert len(first) == 2
    assert busy_workers(server) == first
    assert busy_workers(server, replace(VISIBLE, length=29)) == first, "another video length restarted the workers"


def test_progress_and_previews_arrive_at_every_step(server: ComfyServer) -> None:
    setting = fresh(VISIBLE, steps=4)
    sample(server, fresh(VISIBLE), TWO)
    start = server.mark()
    result = server.run(sampling_graph(setting, TWO))
    assert result.status == "success", result.message
    progress = server.events("progress", result.prompt_id)
    steps = [event for event in progress if event.data["max"] == setting.steps]
    assert [event.data["value"] for event in steps] == [1, 2, 3, 4]
    spread = steps[-1].when - steps[0].when
    assert spread > 0.4 * result.seconds, "the steps were reported together, not one by one"
    previews = server.events("preview", since=start)
    assert len(previews) == setting.steps
    assert all(event.data["image"][:2] == b"\xff\xd8" for event in previews), "previews are not JPEG images"


@pytest.mark.slow
def test_cancel_stops_inside_a_step(server: ComfyServer) -> None:
    """Told by how much the workers still compute, which does not depend on what else the machine does."""
    workers = busy_workers(server)
    before = total_cpu_seconds(workers)
    sample(server, fresh(LONG, steps=1), TWO)
    step = total_cpu_seconds(workers) - before
    prompt_id = start_long_step(server)
    cancelled = total_cpu_seconds(workers)
    server.interrupt()
    assert server.wait(prompt_id).status == "interrupted"
    assert wait_until(lambda: not gains_cpu(workers, seconds=step / 50, within=1.0), timeout=60), "they went on"
    assert total_cpu_seconds(workers) - cancelled < step / 4, "the step was not left early"
    assert busy_workers(server) == workers
    after = fresh(Setting())
    assert relative_difference(sample(server, after, TWO), sample(server, after)) <= 1e-4


@pytest.mark.slow
def test_a_killed_worker_fails_the_prompt_and_the_next_one_works(server: ComfyServer) -> None:
    prompt_id = start_long_step(server)
    before = {worker: worker.cpu_seconds for worker in server.workers()}

    def at_work() -> list[Process]:
        return [worker for worker in server.workers() if worker.cpu_seconds > before.get(worker, 0.0)]

    assert wait_until(lambda: len(at_work()) == 2, timeout=60)
    working = at_work()
    working[-1].kill()
    result = server.wait(prompt_id)
    assert result.status == "error"
    assert re.search(r"rank\W{0,2}[01]\b", result.message, re.IGNORECASE), result.message
    assert "cpu" in result.message.lower(), result.message
    after = fresh(Setting())
    assert relative_difference(sample(server, after, TWO), sample(server, after)) <= 1e-4
    assert not any(worker.alive for worker in working), "a worker of the broken group is left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kept"), [pytest.param(OUT_OF_MEMORY, True, marks=pytest.mark.extended), (BROKEN, False)]
)
def test_a_failure_of_all_workers_is_told_once_and_the_next_prompt_works(
    server: ComfyServer, faults: Faults, kind: str, kept: bool
) -> None:
    workers = busy_workers(server)
    assert len(workers) == 2
    start = server.mark()
    faults.order(kind, [0, 1])
    result = server.run(sampling_graph(fresh(Setting()), TWO))
    faults.clear()
    assert result.status == "error"
    assert re.search(r"worker rank [01] \(cpu, pid \d+\) failed in 'step'", result.message), result.message
    told = [event.data for event in server.events("sequence_parallel.event", since=start)]
    expected = "out_of_memory" if kept else "crashed"
    assert [each["kind"] for each in told] == [expected], told
    assert told[0]["text"] in result.message
    after = fresh(Setting())
    assert relative_difference(sample(server, after, TWO), sample(server, after)) <= 1e-4
    assert (server.workers() == workers) is kept


@pytest.mark.slow
def test_free_gives_the_memory_back(server: ComfyServer) -> None:
    setting = fresh(Setting(checkpoint=DEEP))
    first = sample(server, setting, TWO)
    before = total_resident_bytes(server.workers())
    server.free(unload_models=True, free_memory=False)
    least = file_bytes(server.models, DEEP)  # of the two copies
    wait_until(lambda: before - total_resident_bytes(server.workers()) > least, timeout=20)
    freed = before - total_resident_bytes(server.workers())
    assert freed > least, f"/free gave back {freed / 1e6:.0f} MB of two copies of {least / 1e6:.0f} MB"
    sample(server, fresh(setting), TWO)
    server.free()  # this prompt's own result is not to come from ComfyUI's cache
    sample(server, fresh(setting), TWO)
    assert relative_difference(sample(server, setting, TWO), first) <= 1e-5


def test_nothing_listens_beyond_this_machine(server: ComfyServer) -> None:
    workers = busy_workers(server)
    server_addresses = listening_addresses([server.pid])
    assert server.port in [port for _, port in server_addresses], "the check cannot see the sockets"
    addresses = server_addresses + listening_addresses(worker.pid for worker in workers)
    assert all(is_loopback(address) for address, _ in addresses), addresses


@pytest.mark.slow
def test_a_killed_server_leaves_nothing(start_server: ServerFactory) -> None:
    shared_before = shared_memory_files()
    with start_server() as server:
        require_pack(server)
        cold = server.run(sampling_graph(fresh(Setting()), TWO))
        read_latent(server, cold)
        warm = server.run(sampling_graph(fresh(Setting()), TWO))
        read_latent(server, warm)
        assert warm.seconds < cold.seconds / 3, f"first prompt {cold.seconds:.1f} s, second {warm.seconds:.1f} s"
        start_long_step(server)
        workers = server.workers()
        server.kill()
        assert wait_until(lambda: not any(worker.alive for worker in workers), timeout=60), "workers are left"
        # Files that other programs made meanwhile are in use by them.
        assert not shared_memory_files() - shared_before - shared_memory_in_use()


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.extended), signal.SIGTERM])
def test_a_stopped_server_leaves_nothing(start_server: ServerFactory, how: signal.Signals) -> None:
    """Ctrl-C, and what service managers send; the workers are idle."""
    shared_before = shared_memory_files()
    with start_server() as server:
        require_pack(server)
        sample(server, fresh(Setting()), TWO)
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill(how)
        assert wait_until(lambda: not any(worker.alive for worker in workers), timeout=60), "workers are left"
        assert wait_until(lambda: not server.alive, timeout=60), f"the server did not end on {how.name}"
        assert not shared_memory_files() - shared_before - shared_memory_in_use()
