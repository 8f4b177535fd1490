"""The life of the workers: started once, cancelled, killed, stuck, and never left behind."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from parallel import numerics
from parallel.config import SequenceParallelConfig, WorkerDevice, resolve
from parallel.diffusers.request import request as request_of
from parallel.diffusers.tensors import mapped
from parallel.diffusers.tiny import HEAD_DIM
from parallel.errors import EngineError, WorkerDiedError, WorkerError, WorkerOutOfMemoryError
from parallel.host import group_log, pace, running, status
from parallel.host import process as process_module
from parallel.host.group import WorkerGroup
from parallel.host.pace import Pace
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.measure import QuietRounds
from parallel.sampling.step_request import StepRequest
from parallel.wire import source_files
from parallel.wire.messages import Echo, FreeMemory, Operation, Step, Weights
from parallel.wire.shared import lay_out
from tests.distributed.devices import on_ranks
from tests.distributed.process_facts import (
    all_ended,
    cpu_seconds,
    is_running,
    limit_memory,
    open_tcp_sockets,
    wait_until,
)
from tests.distributed.tiny_models import FLUX, Inputs, TinyModels, loaded, recipe_of, step

ROOT = Path(__file__).parents[2]
CONFIG = SequenceParallelConfig(devices=on_ranks("cpu,cpu"))
DEVICES = CONFIG.devices.split(",")
LOG_NAME = f"workers-{'-'.join(device.replace(':', '') for device in DEVICES)}.log"
SMALL = Inputs(valid=(5,))
LONG = Inputs(frames=4, height=64, width=64)
"""A step of seconds, made of many blocks."""
LARGE = Inputs(frames=8, height=96, width=64)
"""A step that needs more memory than any before it."""
RELEASE_S = 60.0
"""What counts as hanging, also on a busy machine."""


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the groups' log files."""
    group_log.keep_in(tmp_path_factory.mktemp("logs"))
    yield group_log.folder()
    group_log.keep_in(None)


@pytest.fixture(scope="module", autouse=True)
def _groups(logs: Path) -> Iterator[None]:
    """Ends the groups; they are started under an environment that would have them listen on the network."""
    interfaces = sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo")
    with pytest.MonkeyPatch.context() as environment:
        if interfaces:
            environment.setenv("GLOO_SOCKET_IFNAME", interfaces[0])
        yield
    running.stop_all()


@pytest.fixture(scope="module")
def recipe(tiny_models: TinyModels) -> Recipe:
    return recipe_of(tiny_models.path(num_single_layers=6), "cpu,cpu")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(models: dict[str, Any], recipe: Recipe) -> RemoteModel:
    """The same model for all tests, on workers that run: those of the test before, unless that one ended them."""
    model = models.setdefault("model", RemoteModel(recipe))
    model.weights.ensure_loaded()
    expected = models.setdefault("expected", step(model, SMALL))
    assert torch.equal(step(model, SMALL), expected)
    return model


@pytest.fixture
def group(model: RemoteModel) -> WorkerGroup:
    assert model.weights.group is not None
    return model.weights.group


def assert_recovers(model: RemoteModel, models: dict[str, Any], old_pids: list[int]) -> None:
    """The next prompt gets fresh workers and the right result."""
    assert not model.weights.loaded
    model.weights.ensure_loaded()
    assert model.weights.group is not None
    assert set(model.weights.group.pids).isdisjoint(old_pids)
    assert torch.equal(step(model, SMALL), models["expected"])


# --- started once -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_next_prompt_reuses_the_processes(model: RemoteModel, group: WorkerGroup, recipe: Recipe):
    pids = list(group.pids)
    assert running.acquire(CONFIG) is group
    second = RemoteModel(recipe)  # another prompt, the same layout
    second.weights.ensure_loaded()
    assert torch.equal(step(second, SMALL), step(model, SMALL))
    second.weights.unload()
    assert group.pids == pids
    assert all(is_running(pid) for pid in pids)


def test_loading_twice_reads_once(model: RemoteModel, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    calls = spy_on_calls(group, monkeypatch)
    assert model.weights.ensure_loaded() == model.weights.nbytes > 0
    assert calls == []


def test_unloading_frees_the_weights_and_keeps_the_processes(
    model: RemoteModel, group: WorkerGroup, models: dict[str, Any]
):
    pids = list(group.pids)
    model.weights.unload()
    assert (model.weights.loaded, model.weights.nbytes) == (False, 0)
    with pytest.raises(WorkerError, match=f"do not have {model.name} any more"):
        group.call(Weights(model=model.name))
    model.weights.ensure_loaded()
    assert torch.equal(step(model, SMALL), models["expected"])
    assert group.pids == pids


def spy_on_calls(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The message of every call from here on."""
    seen: list[Any] = []
    call = group.call

    def spy(message: Operation, **options: Any) -> Any:
        seen.append(message)
        return call(message, **options)

    monkeypatch.setattr(group, "call", spy)
    return seen


def test_conditioning_travels_once(model: RemoteModel, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    calls = spy_on_calls(group, monkeypatch)
    request = Inputs(valid=(4,), seed=11).make()
    text = request.conditioning["encoder_hidden_states"]

    def step(**changed: torch.Tensor) -> tuple[set[str], torch.Tensor]:
        """Names of the tensors that travelled, and the result. ComfyUI makes new tensors of equal values each time."""
        tensors = {name: tensor.clone() for name, tensor in {**request.conditioning, **changed}.items()}
        (result,) = model.steps([replace(request, conditioning=tensors)])
        message = calls[-1]
        (told,) = message.requests
        return {name for name, key in told.conditioning.items() if key in message.conditioning.put}, result

    sent, first = step()
    assert {"encoder_hidden_states", "pooled_projections", "encoder_attention_mask"} <= sent
    sent, second = step()
    assert sent == set()
    assert torch.equal(first, second)
    sent, other = step(encoder_hidden_states=text + 1)
    assert sent == {"encoder_hidden_states"}
    assert not torch.equal(other, first)
    sent, back = step()  # as cond and uncond take turns
    assert sent == set()
    assert torch.equal(back, first)


def test_one_tensor_of_a_list_travels_when_it_changes(
    group: WorkerGroup, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
):
    """Here of a ControlNet's residuals."""
    plain = Inputs(FLUX).make()
    residuals = [
        torch.randn(*plain.x.shape[:2], 2 * HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(2)
    ]

    def request(*residuals: torch.Tensor) -> StepRequest:
        given = dict(plain.conditioning)
        return request_of(plain.x, plain.timestep, **given, controlnet_block_samples=list(residuals))

    with loaded(group, tiny_models.path(FLUX)) as model:
        calls = spy_on_calls(group, monkeypatch)
        (first,) = model.steps([request(*residuals)])
        model.steps([request(*(each.clone() for each in residuals))])
        (other,) = model.steps([request(residuals[0], residuals[1] + 1)])
    assert [len(call.conditioning.put) for call in calls if isinstance(call, Step)] == [
        len(plain.conditioning) + 2,
        0,
        1,
    ]
    assert not torch.equal(first, other)


def test_many_prompts_do_not_pile_up_in_the_workers(
    model: RemoteModel, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
):
    calls = spy_on_calls(group, monkeypatch)
    for seed in range(20):
        step(model, Inputs(valid=(5,), seed=100 + seed))
    put = sum(len(call.conditioning.put) for call in calls)
    drop = sum(len(call.conditioning.drop) for call in calls)
    assert put >= 40
    assert put - drop <= 16


# --- quiet --------------------------------------------------------------------------------------------------------


@pytest.mark.cpu_ranks("threads of NCCL wake up")
def test_idle_workers_use_no_cpu(model: RemoteModel, group: WorkerGroup):
    used: list[float] = []

    def idle() -> bool:
        before = [cpu_seconds(pid) for pid in group.pids]
        time.sleep(1)
        used[:] = [cpu_seconds(pid) - was for pid, was in zip(group.pids, before, strict=True)]
        return max(used) <= 0.02 + 1e-9

    assert wait_until(idle, 30), used


def test_nothing_listens_on_another_address_than_loopback(model: RemoteModel, group: WorkerGroup):
    sockets = [found for pid in group.pids for found in open_tcp_sockets(pid)]
    assert any(listens for _, listens in sockets), "the ranks listen for each other; if not, look at another protocol"
    assert [str(address) for address, listens in sockets if listens and not address.is_loopback] == []
    assert all(address.is_loopback for address, _ in sockets)


@pytest.mark.extended
def test_a_remote_call_costs_little_more_than_copying(model: RemoteModel, group: WorkerGroup):
    """30 MB to the workers and 30 MB back, in turn with plain copies of the same bytes.

    What the call adds to a step is its time without the workers' own work, here half of a copy each.
    """
    turns, x = 15, torch.randn(30_000_000 // 4)
    (source,), size = lay_out("echo", [(x.shape, x.dtype)])
    segment = group.memory.segment("echo", size)
    buffer = torch.empty_like(x)

    def remote() -> tuple[torch.Tensor, float]:
        segment.tensor(source).copy_(x)
        results, (target,), lend = group.memory.for_results([(x.shape, x.dtype)])
        assert lend
        replies = group.call(Echo(x=source, out=target))
        return results.lend(target), max(reply["seconds"] for reply in replies)

    def plain() -> tuple[torch.Tensor, float]:
        buffer.copy_(x)
        return buffer.clone(), 0.0

    def times_of(run: Callable[[], tuple[torch.Tensor, float]]) -> tuple[float, float]:
        """By the clock, and without the workers' own work."""
        start = time.perf_counter()
        result, work = run()
        taken = time.perf_counter() - start
        assert torch.equal(result, x)
        return taken, taken - work

    def interleaved() -> tuple[float, float]:
        pairs = [(times_of(remote), times_of(plain)) for _ in range(turns)]
        clock, added = (median(r[i] for r, _ in pairs) / median(p[i] for _, p in pairs) for i in (0, 1))
        return clock, added

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        quiet = QuietRounds([os.getpid(), *group.pids])
        ratios = [ratios for _ in range(7) for ratios, _ in quiet.run([interleaved])]
    finally:
        torch.set_num_threads(threads)
    clock, added = (median(values) for values in zip(*ratios, strict=True))
    print(f"remote call: {added:.2f} × plain copies, with the workers' own work {clock:.2f}")
    assert added <= 2.0


def test_results_stay_as_they_are_while_the_caller_keeps_them(model: RemoteModel, models: dict[str, Any]):
    """More of them than are lent from shared memory, kept as views and in part only."""
    request = SMALL.make()

    def moved(i: int) -> torch.Tensor:
        return model.steps([replace(request, x=request.x + i)])[0]

    expected = [moved(i).clone() for i in range(7)]
    kept = [moved(i)[:, :1] for i in range(7)]
    for result, right in zip(kept, expected, strict=True):
        assert torch.equal(result, right[:, :1])
    kept[2].zero_()  # a caller may do as it likes with its own
    assert torch.equal(moved(0), expected[0])


# --- cancelled ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cancel_returns_at_once_and_leaves_the_workers_usable(
    model: RemoteModel, group: WorkerGroup, models: dict[str, Any]
):
    pids = list(group.pids)
    polled = 0

    def poll() -> None:
        nonlocal polled
        polled += 1
        if polled == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.steps([LONG.make()], poll=poll)
    assert group.busy, "the caller has waited for the workers"
    resumed = time.monotonic()
    assert torch.equal(step(model, SMALL), models["expected"])
    waited = time.monotonic() - resumed
    start = time.monotonic()
    step(model, LONG)
    assert waited < (time.monotonic() - start) / 2, "the cancelled step ran to its end"
    assert group.pids == pids


def test_cancel_while_loading(recipe: Recipe, group: WorkerGroup):
    def poll() -> None:
        raise Cancelled

    other = RemoteModel(recipe)
    os.kill(group.pids[0], signal.SIGSTOP)  # so that loading is not over before the first poll
    try:
        with pytest.raises(Cancelled):
            other.weights.ensure_loaded(poll=poll)
    finally:
        os.kill(group.pids[0], signal.SIGCONT)
    assert not other.weights.loaded
    other.weights.ensure_loaded()
    assert step(other, SMALL).isfinite().all()
    other.weights.unload()
    assert group.alive


def test_progress_of_loading_is_told(recipe: Recipe, group: WorkerGroup):
    told: list[tuple[int, int]] = []
    other = RemoteModel(recipe)
    other.weights.ensure_loaded(on_progress=lambda done, total: told.append((done, total)))
    other.weights.unload()
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in mapped(recipe.path).values())


# --- broken: each of these ends the group; the next test's fixture starts a fresh one and checks its result -------


def step_and_disturb(model: RemoteModel, disturb: Any) -> tuple[WorkerError, float]:
    """Runs a long step, calls `disturb` in its middle; returns the error, and how long after that it came."""
    disturbed: list[float] = []

    def act() -> None:
        disturb()
        disturbed.append(time.monotonic())

    threading.Timer(0.5, act).start()
    with pytest.raises(WorkerError) as caught:
        for _ in range(100):
            step(model, LONG)
    return caught.value, time.monotonic() - disturbed[0]


def test_a_killed_rank_fails_the_step_and_is_named(model: RemoteModel, group: WorkerGroup, models: dict[str, Any]):
    pids = list(group.pids)
    error, seconds = step_and_disturb(model, lambda: os.kill(pids[1], signal.SIGKILL))
    assert seconds < RELEASE_S
    assert isinstance(error, WorkerDiedError)
    assert error.rank == 1
    assert f"worker rank 1 ({DEVICES[1]}, pid {pids[1]}) was ended by SIGKILL during 'step'" in str(error)
    assert re.search(r"it had \d+ MiB in use", str(error))
    assert "next prompt starts fresh workers" in str(error)
    assert wait_until(lambda: all_ended(pids), RELEASE_S), "a worker is left"
    with pytest.raises(WorkerDiedError, match="rank 1"):
        step(model, SMALL)
    assert_recovers(model, models, pids)


@pytest.mark.cpu_ranks("a limit of the address space")
def test_a_rank_out_of_memory_releases_its_peers(model: RemoteModel, group: WorkerGroup):
    """It raises inside a block, while its peer waits for it in that block's collective."""
    pids = list(group.pids)
    limit_memory(pids[1], spare=48 << 20)  # enough to reach the blocks
    start = time.monotonic()
    with pytest.raises(WorkerOutOfMemoryError) as caught:
        step(model, LARGE)
    assert time.monotonic() - start < RELEASE_S
    error = caught.value
    assert error.rank == 1
    assert f"worker rank 1 ({DEVICES[1]}, pid {pids[1]}) failed in 'step'" in str(error)
    assert re.search(r"memory in use there: \d+ MiB", str(error))
    assert "Use a smaller size" in str(error)
    lines = error.remote_traceback.splitlines()
    assert all(line.startswith("[rank 1]") for line in lines)
    assert "transformer_hunyuan_video.py" in error.remote_traceback
    told = status.errors()[-1]
    assert (told.kind, told.text) == ("out_of_memory", str(error)), "nobody who watches has been told"
    assert wait_until(lambda: all_ended(pids), RELEASE_S), "a worker is left"


@pytest.mark.slow
def test_a_stuck_rank_is_named(model: RemoteModel, group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    pids = list(group.pids)
    monkeypatch.setattr(pace, "SHORTEST_S", 1.0)
    monkeypatch.setattr(pace, "FACTOR", 1.0)
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    named = rf"worker rank 1 \({DEVICES[1]}, pid \d+\) stopped answering in 'step'"
    with pytest.raises(WorkerDiedError, match=named) as caught:
        step(model, SMALL)
    assert 1.0 <= time.monotonic() - start < RELEASE_S
    assert caught.value.rank == 1
    assert wait_until(lambda: all_ended(pids), RELEASE_S)


@pytest.mark.slow
@pytest.mark.cpu_ranks("a limit of the address space")
def test_a_rank_that_fails_after_cancel_does_not_hang_the_next_prompt(model: RemoteModel, group: WorkerGroup):
    pids = list(group.pids)

    def poll() -> None:
        limit_memory(pids[1], spare=8 << 20)
        time.sleep(2)  # meanwhile rank 1 fails, and rank 0 waits for it
        raise Cancelled

    with pytest.raises(Cancelled):
        model.steps([LARGE.make()], poll=poll)
    start = time.monotonic()
    with pytest.raises(WorkerOutOfMemoryError, match="rank 1"):
        step(model, SMALL)
    assert time.monotonic() - start < RELEASE_S
    assert wait_until(lambda: all_ended(pids), RELEASE_S)
    assert not model.weights.loaded


# --- ended --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_group() -> Iterator[WorkerGroup]:
    """A group of its own, without a model."""
    group = WorkerGroup(resolve(CONFIG), threads=1)
    yield group
    group.stop()


def test_a_start_that_is_cancelled_leaves_nothing(bare_group: WorkerGroup):
    def poll() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        bare_group.start(poll)
    assert wait_until(lambda: all_ended(bare_group.pids), RELEASE_S)
    assert not bare_group.alive


def test_workers_leave_by_themselves_when_told_to(bare_group: WorkerGroup):
    bare_group.start()
    processes = [worker.process for worker in bare_group.workers]
    bare_group.stop()
    assert [process.returncode for process in processes] == [0, 0]
    with pytest.raises(EngineError, match="the workers were stopped"):
        bare_group.call(FreeMemory())


def test_a_stopped_group_leaves_no_descriptor_and_no_thread():
    def held() -> tuple[list[str], list[str]]:
        gc.collect()
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        kinds = [re.sub(r"\d+", "N", link) for link in links if not link.startswith("/proc/")]
        return sorted(kinds), sorted(thread.name for thread in threading.enumerate())

    before = held()
    group = WorkerGroup(resolve(SequenceParallelConfig(devices=on_ranks("cpu"))), threads=1)
    group.start()
    (source, target), size = lay_out("echo", [((4,), torch.float32)] * 2)
    segment = group.memory.segment("echo", size)
    segment.tensor(source).fill_(3)
    group.call(Echo(x=source, out=target))
    assert segment.tensor(target).sum() == 12
    group.stop()
    del group, segment  # the mappings go with them
    assert held() == before


def test_a_rank_that_dies_while_idle_is_noticed(bare_group: WorkerGroup):
    bare_group.start()
    assert bare_group.alive
    os.kill(bare_group.pids[0], signal.SIGKILL)
    assert wait_until(lambda: not bare_group.alive and all_ended(bare_group.pids), RELEASE_S)
    with pytest.raises(WorkerDiedError, match=rf"worker rank 0 \({DEVICES[0]}, pid \d+\) was ended by SIGKILL"):
        bare_group.call(FreeMemory())


def test_a_worker_that_cannot_start_says_why(bare_group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_module, "_BOOT", Path("no_such_boot_script.py"))
    with pytest.raises(WorkerDiedError, match=r"(?s)ended with exit code 2.*its last lines:.*no_such_boot_script.py"):
        bare_group.start()
    assert wait_until(lambda: all_ended(bare_group.pids), RELEASE_S)


def test_an_error_names_the_log_that_has_all_of_it(
    bare_group: WorkerGroup, logs: Path, monkeypatch: pytest.MonkeyPatch
):
    path = logs / LOG_NAME
    before = len(path.read_text()) if path.exists() else 0
    monkeypatch.setattr(process_module, "_BOOT", Path("no_such_boot_script.py"))
    with pytest.raises(WorkerDiedError) as caught:
        bare_group.start()
    assert str(caught.value).endswith(f"; log: {path}") and str(caught.value).count(str(path)) == 1
    lines = [line.partition(" [")[2] for line in path.read_text()[before:].splitlines()]
    assert re.match(rf"host\] starting workers on {CONFIG.devices} .*torch {re.escape(torch.__version__)}", lines[0])
    said = rf"rank {caught.value.rank}\] .*no_such_boot_script.py"
    assert any(re.match(said, line) for line in lines), "what the worker printed"
    assert any(re.match(r"host\] worker rank \d .* ended with exit code 2", line) for line in lines)


@pytest.mark.slow
def test_the_log_has_the_traceback_of_every_rank(group: WorkerGroup, logs: Path):
    path = logs / LOG_NAME
    before = len(path.read_text())
    with pytest.raises(WorkerError, match="do not have no-such-model any more"):
        group.call(Weights(model="no-such-model"))

    def lines() -> list[str]:
        return [line.partition(" [")[2] for line in path.read_text()[before:].splitlines()]

    for rank in range(2):  # one reply is enough for the error; the other one's lines may come after it
        wanted = f"rank {rank}] Traceback (most recent call last):"
        assert wait_until(lambda wanted=wanted: wanted in lines(), RELEASE_S), lines()


def test_workers_start_with_the_hosts_switches_of_torch(bare_group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    """Here with one that cannot be set, so that it shows."""
    switches = numerics.read() | {"deterministic": ["unheard-of"]}
    monkeypatch.setattr(numerics, "read", lambda: switches)
    with pytest.raises(WorkerDiedError, match=r"(?s)numerics.py.*not enough values to unpack"):
        bare_group.start()


def test_workers_of_changed_files_say_so(bare_group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    """As after an update of the pack while ComfyUI runs."""
    monkeypatch.setattr(source_files, "AT_IMPORT", "another")
    with pytest.raises(WorkerDiedError, match=r"files of this pack have changed.*restart ComfyUI"):
        bare_group.start()


def test_silent_gpus_come_with_advice(bare_group: WorkerGroup, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("parallel.host.group._starts", Pace(unknown=0.0))
    layout = replace(bare_group.layout, devices=tuple(WorkerDevice(name=f"cuda:{i}") for i in range(2)))
    monkeypatch.setattr(bare_group, "layout", layout)
    with pytest.raises(WorkerDiedError, match=r"did not start within 0 s.*NCCL_P2P_DISABLE=1"):
        bare_group.start()


@pytest.mark.slow
def test_a_killed_host_leaves_no_worker_and_no_file(recipe: Recipe, tmp_path: Path):
    shm = set(Path("/dev/shm").iterdir())
    host = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.dying_host", recipe.path],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert host.stdout is not None
    try:
        pids = json.loads(host.stdout.readline())
        assert host.stdout.readline() == "busy\n"
        assert all(is_running(pid) for pid in pids)
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    assert wait_until(lambda: all_ended(pids), RELEASE_S), "workers outlive their host"
    assert {path for path in set(Path("/dev/shm").iterdir()) - shm if "sequence-parallel" in path.name} == set()
    assert list(tmp_path.glob("*sequence-parallel*")) == []
