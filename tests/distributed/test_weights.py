"""Weights that a LoRA changes: replaced in the workers, changed again, and put back to the bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.config import SequenceParallelConfig, resolve
from parallel.diffusers.tensors import mapped
from parallel.errors import CheckpointError, WorkerDiedError, WorkerError
from parallel.host import remote_weights
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import Operation, Weights
from tests.distributed.changed_weights import WEIGHTS, changed, write_changed
from tests.distributed.devices import on_ranks
from tests.distributed.process_facts import wait_until
from tests.distributed.tiny_models import (
    NETWORKS,
    WAN,
    Inputs,
    StartGroup,
    TinyModels,
    loaded,
    recipe_of,
    step,
)

DEVICES = "cpu,cpu"
QUERY = "transformer_blocks.0.attn.to_q.weight"
SOME = (QUERY, "single_transformer_blocks.0.proj_mlp.weight", "x_embedder.proj.bias", "norm_out.linear.weight")
PADDED = Inputs(valid=(5,))


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@dataclass
class Case:
    """A model on the shared workers."""

    model: RemoteModel
    path: Path

    def step(self) -> Tensor:
        return step(self.model, PADDED)

    def replace(self, version: Any, names: Collection[str], factor: float = 1.5, **options: Any) -> None:
        self.model.weights.replace(version, names, changed(self.path, factor), **options)


@pytest.fixture
def case(start_group: StartGroup, tiny_models: TinyModels) -> Iterator[Case]:
    with loaded(start_group(DEVICES), tiny_models.path()) as model:
        yield Case(model, tiny_models.path())


@pytest.fixture
def sent(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The messages about weights from here on."""
    group = case.model.weights.group
    assert group is not None
    messages: list[Weights] = []
    call = group.call

    def spy(message: Operation, **options: Any) -> Any:
        if isinstance(message, Weights):
            messages.append(message)
        return call(message, **options)

    monkeypatch.setattr(group, "call", spy)
    return messages


@pytest.mark.parametrize(
    ("network", "dtype"), [*((network, torch.float32) for network in NETWORKS), (WAN, torch.bfloat16)]
)
def test_replaced_weights_give_what_a_file_with_them_gives(
    start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, network: str, dtype: torch.dtype
):
    """Every tensor of the file, so that none of them goes to a wrong place."""
    group, path, inputs = start_group(DEVICES), tiny_models.path(network), Inputs(network, dtype=dtype)
    names = write_changed(path, tmp_path / "changed")
    with loaded(group, tmp_path / "changed", dtype) as model:
        expected = step(model, inputs)
    with loaded(group, path, dtype) as model:
        base = step(model, inputs)
        model.weights.replace("changed", names, changed(path))
        replaced = step(model, inputs)
        model.weights.replace(None, (), changed(path))
        restored = step(model, inputs)
    assert torch.equal(replaced, expected)
    assert torch.equal(restored, base)
    assert not torch.equal(replaced, base)


def test_each_replacement_starts_from_the_file(case: Case):
    case.replace("half", SOME, 0.5)
    half = case.step()
    case.replace("other", [QUERY, "single_transformer_blocks.0.proj_out.weight"], -0.7)
    assert not torch.equal(case.step(), half)
    case.replace("half again", SOME, 0.5)
    assert torch.equal(case.step(), half)


def test_only_what_changes_travels(case: Case, sent: list[Weights]):
    def touched() -> tuple[set[str], set[str]]:
        """Names of the tensors that travelled, and of those that the workers took from the file."""
        put = {name for message in sent for name in message.put}
        restored = {name for message in sent for name in message.restore}
        sent.clear()
        return put, restored

    case.replace(None, ())
    assert touched() == (set(), set())
    case.replace("first", SOME)
    assert touched() == (set(SOME), set())
    case.replace("first", SOME)
    case.step()
    case.step()
    assert touched() == (set(), set())
    case.replace("second", [QUERY], 0.5)
    assert touched() == ({QUERY}, set(SOME) - {QUERY})
    case.replace(None, ())
    assert touched() == (set(), {QUERY})


def test_shared_memory_holds_a_few_weights_at_a_time(case: Case, sent: list[Weights], monkeypatch: pytest.MonkeyPatch):
    case.replace("at once", SOME)
    expected = case.step()
    assert len(sent) == 1
    case.replace(None, ())
    sent.clear()
    limit = 1 << 19
    monkeypatch.setattr(remote_weights, "_BATCH_BYTES", limit)
    told: list[tuple[int, int]] = []
    case.replace("in parts", SOME, on_progress=lambda done, total: told.append((done, total)))
    assert torch.equal(case.step(), expected)
    stored = mapped(str(case.path))
    sizes = [sum(stored[name].nbytes for name in message.put) for message in sent]
    counts = [len(message.put) for message in sent]
    assert len(SOME) > len(counts) > 1
    assert all(size <= limit or count == 1 for size, count in zip(sizes, counts, strict=True))
    assert told == [(sum(counts[: i + 1]), len(SOME)) for i in range(len(counts))]


@pytest.mark.parametrize("after", [1, 2, 4])
def test_cancel_in_the_middle_leaves_nothing_half_done(case: Case, monkeypatch: pytest.MonkeyPatch, after: int):
    base = case.step()
    case.replace("first", SOME)
    expected = case.step()
    case.replace(None, ())
    monkeypatch.setattr(remote_weights, "_BATCH_BYTES", 1)
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls >= after:
            raise Cancelled

    with pytest.raises(Cancelled):
        case.replace("first", SOME, poll=poll)
    case.replace("first", SOME)
    assert torch.equal(case.step(), expected)
    polls = 0
    with pytest.raises(Cancelled):
        case.replace("second", SOME, 0.5, poll=poll)
    case.replace(None, ())
    assert torch.equal(case.step(), base)


def test_cancel_while_the_workers_are_at_it(case: Case):
    """One of them is slow: the next call waits before it writes to the shared memory again."""
    assert case.model.weights.group is not None
    case.replace("first", SOME)
    expected = case.step()
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == len(SOME) + 3:
            raise Cancelled

    slow = case.model.weights.group.pids[0]
    os.kill(slow, signal.SIGSTOP)
    try:
        with pytest.raises(Cancelled):
            case.replace("second", SOME, 0.5, poll=poll)
    finally:
        os.kill(slow, signal.SIGCONT)
    case.replace("first", SOME)
    assert torch.equal(case.step(), expected)


def test_a_failure_on_the_host_is_the_callers(case: Case):
    base = case.step()

    def fail(name: str) -> Tensor:
        raise KeyError(name)

    with pytest.raises(KeyError):
        case.model.weights.replace("broken", SOME, fail)
    case.replace(None, ())
    assert torch.equal(case.step(), base)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("lora.down", "the network has no weight 'lora.down'"),
        (QUERY, rf"the weight {QUERY} has the shape \[256, 256\], received \[3\]"),
    ],
    ids=["no_such_weight", "another_shape"],
)
def test_a_replacement_that_does_not_fit_is_refused(case: Case, name: str, complaint: str):
    assert case.model.weights.group is not None
    base, pids = case.step(), case.model.weights.group.pids
    with pytest.raises(WorkerError, match=complaint) as caught:
        case.model.weights.replace("broken", [name], lambda _: torch.zeros(3))
    assert caught.value.remote_type == CheckpointError.__name__
    case.replace("right", SOME)
    case.replace(None, ())
    assert torch.equal(case.step(), base)
    assert case.model.weights.group.pids == pids


def test_a_folder_that_went_away_is_named(start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path):
    path, away = tmp_path / "moved", tmp_path / "away"
    shutil.copytree(tiny_models.path(), path)
    group = start_group(DEVICES)
    with loaded(group, path) as model:
        base, pids = step(model, PADDED), group.pids
        model.weights.replace("changed", SOME, changed(path))
        path.rename(away)
        with pytest.raises(WorkerError, match=f"{path} is damaged or incomplete: .*{WEIGHTS}") as caught:
            model.weights.replace(None, (), changed(away))
        assert caught.value.remote_type == CheckpointError.__name__
        away.rename(path)
        model.weights.replace(None, (), changed(path))
        assert torch.equal(step(model, PADDED), base)
        assert group.pids == pids  # an error of all workers alike leaves them running


def test_loading_again_starts_from_the_file(case: Case, sent: list[Weights]):
    base = case.step()
    case.replace("changed", SOME)
    replaced = case.step()
    case.model.weights.unload()
    case.model.weights.ensure_loaded()
    assert torch.equal(case.step(), base)
    sent.clear()
    case.replace("changed", SOME)
    assert {name for message in sent for name in message.put} == set(SOME)
    assert torch.equal(case.step(), replaced)


@pytest.mark.slow
def test_fresh_workers_are_given_the_weights_again(tiny_models: TinyModels):
    layout, path = resolve(SequenceParallelConfig(devices=on_ranks(DEVICES))), tiny_models.path()
    groups = [WorkerGroup(layout, threads=1) for _ in range(2)]
    results = []
    try:
        model = RemoteModel(recipe_of(path, DEVICES), group=groups[0])
        for group in groups:
            group.start()
            model.weights._own_group = group
            model.weights.ensure_loaded()
            model.weights.replace("changed", SOME, changed(path))
            results.append(step(model, PADDED))
            group.workers[-1].process.kill()
            assert wait_until(lambda group=group: not group.alive, seconds=60)
            with pytest.raises(WorkerDiedError):
                model.weights.replace(None, (), changed(path))
            assert not model.weights.loaded
    finally:
        for group in groups:
            group.stop()
    assert torch.equal(*results)
