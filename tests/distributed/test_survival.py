"""Whatever one rank does in whatever phase: one message that names it, soon; the next prompt works; nothing is left.

The table crosses phases with faults. The plain run shows each fault and each phase; `-m extended` all of them, on two
and on three workers.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from parallel.compilation.settings import CompileSettings
from parallel.errors import WorkerError
from parallel.host import running
from parallel.host.compiled_sampling import CompiledSampling
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import Echo
from parallel.wire.shared import lay_out
from tests.distributed import faulty_boot as boot
from tests.distributed.changed_weights import changed
from tests.distributed.faults import Faults
from tests.distributed.process_facts import all_ended, wait_until
from tests.distributed.test_sampling import SETTINGS, Sampling
from tests.distributed.tiny_models import Inputs, TinyModels, recipe_of, step

pytestmark = pytest.mark.slow

SMALL = Inputs(valid=(5,))
PATCHED = "proj_out.weight"
LONG_S = 60.0
"""What counts as hanging, also on a busy machine."""

FAULTS = {
    boot.EXITS: rf"ended with exit code {boot.EXIT_CODE}",
    boot.IS_KILLED: "was ended by SIGKILL",
    boot.VANISHED: "was ended by SIGBUS",
    boot.IS_STOPPED: "the process has been in state T",
    boot.RAISES: "RuntimeError: a fault of rank",
    boot.OUT_OF_MEMORY: "CUDA out of memory",
    boot.UNREADABLE: "Input/output error",
    boot.NO_ROOM: "No space left on device",
    boot.GARBAGE: "has sent data that is not a message",
    boot.SHORT: "has sent data that is not a message",
    boot.STRAY: "has sent a message that makes no sense",
    boot.CLOSED: "has closed its connection|ended with exit code 0",
}
"""Fault → what its message says."""


@dataclass(frozen=True)
class Phase:
    """A part of a prompt's life."""

    name: str
    place: str
    """See `Faults.order`."""
    operation: str | None
    """As messages name it; None where workers start."""
    faults: tuple[str, ...]
    count: int = 1


_ENDS = (boot.EXITS, boot.IS_KILLED, boot.IS_STOPPED)
_SAYS = (boot.GARBAGE, boot.SHORT, boot.STRAY, boot.CLOSED)
PHASES = (
    Phase("start", "before start", None, (boot.EXITS, boot.IS_KILLED, boot.IS_STOPPED, boot.RAISES)),
    Phase("meeting", "before meeting", None, (*_ENDS, boot.RAISES, boot.NO_ROOM, boot.GARBAGE, boot.CLOSED)),
    Phase(
        "load",
        "before parameter",
        "load",
        (*_ENDS, *_SAYS, boot.RAISES, boot.OUT_OF_MEMORY, boot.UNREADABLE, boot.NO_ROOM, boot.VANISHED),
        count=3,
    ),
    Phase("LoRA", "before LoRA", "weights", (*_ENDS, boot.RAISES, boot.OUT_OF_MEMORY, boot.GARBAGE)),
    Phase("self-check", "before self-check", "step", (boot.EXITS, boot.RAISES, boot.OUT_OF_MEMORY)),
    Phase("compile", "before compile", "step", (boot.EXITS, boot.IS_STOPPED, boot.RAISES, boot.NO_ROOM)),
    Phase(
        "step",
        "before block",
        "step",
        (*_ENDS, *_SAYS, boot.RAISES, boot.OUT_OF_MEMORY, boot.NO_ROOM, boot.VANISHED),
        count=3,
    ),
    Phase("exchange", "before exchange", "step", (*_ENDS, boot.RAISES, boot.OUT_OF_MEMORY), count=2),
    Phase("sampling", "before pass", "sample", (*_ENDS, *_SAYS, boot.RAISES, boot.OUT_OF_MEMORY), count=2),
    Phase("tile", "before echo", "echo", (*_ENDS, *_SAYS, boot.RAISES)),
    Phase("unload", "before unload", "unload", (*_ENDS, boot.RAISES, boot.GARBAGE)),
)
TABLE = [(phase, fault) for phase in PHASES for fault in phase.faults]


def _plain() -> set[tuple[str, str]]:
    """One fault for each phase and one phase for each fault, with few pairs."""
    chosen: dict[str, str] = {}
    for phase in sorted(PHASES, key=lambda phase: len(phase.faults)):
        chosen[phase.name] = next((fault for fault in phase.faults if fault not in chosen.values()), phase.faults[0])
    pairs = set(chosen.items())
    for fault in FAULTS:
        if fault not in chosen.values():
            pairs.add((next(phase.name for phase in PHASES[::-1] if fault in phase.faults), fault))
    return pairs


def cases() -> Iterator[object]:
    """Workers, rank, phase and fault, as parameters. Ranks take turns."""
    plain = _plain()
    for workers in (2, 3):
        for number, (phase, fault) in enumerate(TABLE):
            rank = number % workers
            marks = [] if workers == 2 and (phase.name, fault) in plain else [pytest.mark.extended]
            name = f"{phase.name}-{fault}-rank {rank} of {workers}"
            yield pytest.param(workers, rank, phase, fault, marks=marks, id=name)


@dataclass
class Left:
    """What a prompt may leave behind in this process and on this machine."""

    descriptors: int
    children: int
    maps: int
    files: frozenset[str]

    @classmethod
    def now(cls) -> Left:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return cls(
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            children=len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
            maps=maps.count("memfd:sequence-parallel"),
            files=frozenset(entry.name for entry in Path(os.environ["TMPDIR"]).iterdir()),
        )


class Prompt:
    """A prompt's phases, one after the other; each call does what is missing of the earlier ones."""

    def __init__(self, tiny_models: TinyModels, devices: str, rank: int):
        self._path = tiny_models.path(heads=3, num_single_layers=4)
        self.model = RemoteModel(recipe_of(self._path, devices))
        self._rank = rank

    def load(self) -> None:
        self.model.weights.ensure_loaded()

    def patch(self) -> None:
        self.load()
        self.model.weights.replace(object(), [PATCHED], changed(self._path))

    def step(self) -> torch.Tensor:
        self.load()
        return step(self.model, SMALL).clone()

    def compiled(self) -> None:
        self.load()
        self.model.steps([SMALL.make()], compiled=CompiledSampling(CompileSettings(dynamic=False)))

    def sample(self) -> torch.Tensor:
        self.load()
        return self.model.sample(Sampling(SETTINGS["euler"]).record())[0]

    def tile(self) -> None:
        self.load()
        group = self.model.weights.group
        assert group is not None
        (source, target), size = lay_out("echo", [((4,), torch.float32)] * 2)
        group.memory.segment("echo", size)
        group.settle(None)
        with group.tasks():
            task = group.submit(self._rank, Echo(x=source, out=target))
            group.wait_for(lambda: task.answered)
        if any(reply.error for reply in task.replies.values()):
            raise group.task_error(task, "ADVICE")

    def unload(self) -> None:
        """As it is done for a prompt; what it only logs is raised here."""
        self.load()
        group, weights = self.model.weights.group, self.model.weights
        assert group is not None
        group.call(weights._goodbye)


RUN: dict[str, tuple[Callable[[Prompt], object], Callable[[Prompt], object]]] = {
    "start": (lambda prompt: None, Prompt.load),
    "meeting": (lambda prompt: None, Prompt.load),
    "load": (lambda prompt: running.acquire(prompt.model.recipe.config), Prompt.load),
    "LoRA": (Prompt.load, Prompt.patch),
    "self-check": (Prompt.load, Prompt.step),
    "compile": (Prompt.load, Prompt.compiled),
    "step": (Prompt.load, Prompt.step),
    "exchange": (Prompt.load, Prompt.step),
    "sampling": (Prompt.load, Prompt.sample),
    "tile": (Prompt.load, Prompt.tile),
    "unload": (Prompt.load, Prompt.unload),
}
"""Phase → what comes before the fault, and what meets it."""


def failure_of(run: Callable[[Prompt], object], prompt: Prompt) -> tuple[int, str]:
    """Rank and text of the error. Its traceback, which would keep the workers' memory, is gone."""
    try:
        run(prompt)
    except WorkerError as error:
        return error.rank, str(error)
    raise AssertionError("nothing has failed")


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[int, torch.Tensor]:
    """Number of workers → the step's result."""
    return {}


@pytest.fixture(scope="module")
def nothing() -> list[Left]:
    """What there is without workers, once there have been some."""
    return []


@pytest.fixture(scope="module")
def took(request: pytest.FixtureRequest) -> Iterator[list[float]]:
    """Seconds from each fault to its message; a run shows the longest."""
    seconds: list[float] = []
    yield seconds
    if seconds:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{len(seconds)} faults: the slowest message came after {max(seconds):.1f} s")


@pytest.mark.cpu_ranks("processes that end and lie, which no device knows of")
@pytest.mark.parametrize(("workers", "rank", "phase", "fault"), list(cases()))
def test_a_fault_is_named_and_leaves_nothing(
    workers: int,
    rank: int,
    phase: Phase,
    fault: str,
    faults: Faults,
    tiny_models: TinyModels,
    expected: dict[int, torch.Tensor],
    nothing: list[Left],
    took: list[float],
) -> None:
    faults.clear()
    devices = ",".join(["cpu"] * workers)
    prompt = Prompt(tiny_models, devices, rank)
    if workers not in expected:
        expected[workers] = prompt.step()
        prompt.model.weights.unload()
        running.stop_all()
        nothing.append(Left.now())

    prepare, run = RUN[phase.name]
    if phase.operation is None:
        running.stop_all()
    prepare(prompt)
    pids = [pid for group in running.running() for pid in group.pids]
    faults.order(fault, [rank], place=phase.place, count=phase.count)
    began = time.monotonic()
    named, text = failure_of(run, prompt)
    took.append(time.monotonic() - began)
    assert took[-1] < LONG_S
    assert named == rank and f"worker rank {rank} (cpu, pid " in text, text
    assert re.search(FAULTS[fault], text), text
    if phase.operation is not None:
        assert f"'{phase.operation}'" in text, text

    faults.clear()
    del prompt
    running.stop_all()  # what has failed is shown until then
    assert all_ended(pids)
    wait_until(lambda: Left.now() == nothing[-1], LONG_S)
    assert Left.now() == nothing[-1]

    prompt = Prompt(tiny_models, devices, rank)
    assert torch.equal(prompt.step(), expected[workers]), "the next prompt"
    prompt.model.weights.unload()


@pytest.mark.parametrize("phase", ["load", "step", "sampling"])
def test_a_slow_rank_is_waited_for(
    phase: str, faults: Faults, tiny_models: TinyModels, expected: dict[int, torch.Tensor]
) -> None:
    """Ten times slower and more: the same result, and no complaint."""
    faults.clear()
    prompt = Prompt(tiny_models, "cpu,cpu", 1)
    prompt.load()
    result = prompt.sample() if phase == "sampling" else prompt.step()
    prompt.model.weights.unload()
    faults.order(boot.SLOW, [1], place={"load": "before parameter", "step": "before block"}.get(phase, "before pass"))
    assert torch.equal(prompt.sample() if phase == "sampling" else prompt.step(), result)
    faults.clear()
    prompt.model.weights.unload()
