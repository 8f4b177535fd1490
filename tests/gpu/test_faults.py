"""What goes wrong on GPUs: the prompt ends soon with one message, and the next one works.

`pytest tests/gpu/test_faults.py --devices shared|cuda`; `make gpu` runs it so, and its toy on CPU ranks. The plain run
has the same on CPU ranks in `tests/distributed/test_faults.py`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from parallel.errors import WorkerDiedError, WorkerError, WorkerOutOfMemoryError
from parallel.host import calls, pace, running, status
from parallel.host import process as process_module
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import FreeMemory
from tests.distributed.devices import chosen, kind, on_ranks
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of, relative_difference, step
from tests.gpu import faulty_boot
from tests.gpu.faulty_boot import ILLEGAL_ACCESS, OUT_OF_MEMORY, order

TOY = "SEQUENCE_PARALLEL_GPU_TOY"
pytestmark = pytest.mark.skipif(
    chosen() == "cpu" and os.environ.get(TOY) != "1", reason="ranks on GPUs are asked for with --devices shared or cuda"
)
cuda = pytest.mark.skipif(chosen() == "cpu", reason="no CUDA ranks")

RANKS = "cpu,cpu"
SMALL, LONG = Inputs(valid=(5,)), Inputs(frames=4, height=64, width=64)
MOST_S = 10.0
"""How soon a prompt ends after the fault."""


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@dataclass
class Faulty:
    """A model whose workers fail when told to."""

    model: RemoteModel
    folder: Path
    expected: Tensor

    @property
    def pids(self) -> list[int]:
        assert self.model.weights.group is not None
        return list(self.model.weights.group.pids)

    def fails(self, kind: type[WorkerError], disturb: Callable[[], None], most_s: float = MOST_S) -> WorkerError:
        """Runs steps, disturbs them after a while, and waits for the error: it comes in time, and is told once."""
        told, disturbed = len(status.errors()), []

        def act() -> None:
            disturbed.append(time.monotonic())
            disturb()

        timer = threading.Timer(0.5, act)
        timer.start()
        try:
            with pytest.raises(kind) as caught:
                while not disturbed or time.monotonic() - disturbed[0] < 4 * most_s:
                    step(self.model, LONG)
            seconds = time.monotonic() - disturbed[0]
        finally:
            timer.join()
        print(f"{seconds:.2f} s: {caught.value}")
        assert seconds <= most_s
        assert [error.text for error in status.errors()[told:]] == [str(caught.value)]
        return caught.value

    def works(self) -> None:
        """As the next prompt does."""
        self.model.weights.ensure_loaded()
        assert relative_difference(step(self.model, SMALL), self.expected) <= kind().split


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faults")
    path = TinyModels(tmp_path_factory.mktemp("models")).path(num_single_layers=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_module, "_BOOT", Path(faulty_boot.__file__))
        patch.setenv(faulty_boot.VARIABLE, str(folder))
        model = RemoteModel(recipe_of(path, on_ranks(RANKS)))
        model.weights.ensure_loaded()
        yield Faulty(model, folder, step(model, SMALL))
    running.stop_all()


@pytest.fixture
def faulty(made: Faulty) -> Iterator[Faulty]:
    made.works()
    yield made
    for left in made.folder.iterdir():
        left.unlink()


def test_cancel_in_the_middle_of_a_step(faulty: Faulty, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "_SLICE_S", 0.0005)
    before, polled = faulty.pids, []

    def poll() -> None:
        polled.append(time.monotonic())
        raise Cancelled

    with pytest.raises(Cancelled):
        faulty.model.steps([LONG.make()], poll=poll)
    assert time.monotonic() - polled[0] <= 1
    faulty.works()
    print(f"the workers were free after {time.monotonic() - polled[0]:.2f} s")
    assert time.monotonic() - polled[0] <= MOST_S
    assert faulty.pids == before


def test_unload_models_gives_the_memory_back(faulty: Faulty):
    """What ComfyUI's `/free` comes to."""
    before, group = faulty.pids, faulty.model.weights.group
    assert group is not None
    step(faulty.model, LONG)
    in_use = [rank["memory"] for rank in group.status()["ranks"]]
    weights = faulty.model.weights.nbytes
    faulty.model.weights.unload()
    group.call(FreeMemory())
    left = [rank["memory"] for rank in group.status()["ranks"]]
    print(f"weights {weights / 2**20:.1f} MiB; in use {in_use} before and {left} after")
    if chosen() != "cpu":  # a CPU's allocator keeps what it likes
        assert all(now <= was - weights for now, was in zip(left, in_use, strict=True))
    assert not faulty.model.weights.loaded
    faulty.works()
    assert faulty.pids == before


@pytest.mark.parametrize("rank", range(RANKS.count("cpu")))
def test_a_rank_is_killed_in_the_middle_of_a_step(faulty: Faulty, rank: int):
    pid = faulty.pids[rank]
    error = faulty.fails(WorkerDiedError, lambda: os.kill(pid, signal.SIGKILL))
    assert f"rank {rank}" in str(error) and "SIGKILL" in str(error)
    faulty.works()


@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["one rank", "all ranks"])
def test_out_of_memory(faulty: Faulty, ranks: tuple[int, ...]):
    error = faulty.fails(WorkerOutOfMemoryError, lambda: order(faulty.folder, OUT_OF_MEMORY, *ranks))
    assert f"rank {ranks[0]}" in str(error) if len(ranks) == 1 else "rank" in str(error)
    faulty.works()


@cuda
@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["one rank", "all ranks"])
def test_an_illegal_access(faulty: Faulty, ranks: tuple[int, ...]):
    """CUDA refuses everything to a process after it: only others can go on."""
    before = faulty.pids
    error = faulty.fails(WorkerError, lambda: order(faulty.folder, ILLEGAL_ACCESS, *ranks))
    assert "illegal memory access" in str(error)
    faulty.works()
    assert set(faulty.pids).isdisjoint(before)


def test_a_rank_stands_still(faulty: Faulty):
    pid = faulty.pids[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "HALTED_S", 2.0)
        error = faulty.fails(WorkerDiedError, lambda: os.kill(pid, signal.SIGSTOP))
    assert "rank 1" in str(error)
    faulty.works()
