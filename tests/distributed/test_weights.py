"""Weights that a LoRA changes: replaced in the workers, changed again, and put back to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.checkpoints.source import Stored, open_source
from parallel.config import SequenceParallelConfig, resolve
from parallel.demo.checkpoint import SCALED_LAYOUTS
from parallel.errors import WorkerDiedError, WorkerError
from parallel.host import remote_weights
from parallel.host.group import WorkerGroup
from parallel.host.remote_model import RemoteModel
from parallel.worker.resident import ResidentModel
from tests.distributed.devices import on_ranks
from tests.distributed.process_facts import wait_until
from tests.distributed.tiny_models import Inputs, StartGroup, TinyModels, recipe_of

DEVICES = "cpu,cpu"
QKV = "double_blocks.0.img_attn.qkv.weight"
HEAD = "final_layer.adaLN_modulation.1.weight"
SOME = (QKV, "single_blocks.0.linear1.weight", "single_blocks.0.linear1.bias", HEAD)
FLUX_INPUTS = Inputs(frames=None, sigma=True)
fp8 = torch.float8_e4m3fn


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


def change(name: str, stored: Stored, factor: float = 1.5) -> Stored:
    """What the tests replace a weight by."""
    tensor, scale = stored
    if scale is None:
        return Stored((tensor.float() * factor + 0.01).to(tensor.dtype))
    return Stored((tensor.float() * -0.7).to(tensor.dtype), scale * factor)


def write_changed(path: Path, target: Path, storage: torch.dtype) -> set[str]:
    """The checkpoint with every tensor changed; returns their names."""
    source, tensors = open_source(str(path)), load_file(path)
    with source.reader() as read:
        for name in source.tensors:
            tensor, scale = read.stored(name)
            keep = tensor.dtype if scale is not None else torch.float32 if source.scales else storage
            changed = change(name, Stored(tensor.to(keep), scale))
            tensors[source.files[name][1]] = changed.tensor
            if changed.scale is not None:
                tensors[source.files[source.scales[name]][1]] = torch.tensor(changed.scale)
    save_file(tensors, target, source.metadata)
    return set(source.tensors)


@dataclass
class Case:
    """A model on the shared workers."""

    model: RemoteModel
    inputs: Inputs

    def step(self) -> Tensor:
        return self.model.step(*self.inputs.make())

    def replace(self, version: Any, names: Collection[str], factor: float = 1.5, **options: Any) -> None:
        self.model.replace_weights(version, names, lambda name, stored: change(name, stored, factor), **options)


@pytest.fixture
def case(start_group: StartGroup, tiny_models: TinyModels) -> Iterator[Case]:
    model = RemoteModel(recipe_of(tiny_models.path(), DEVICES), group=start_group(DEVICES))
    model.ensure_loaded()
    yield Case(model, Inputs(valid=(5,)))
    model.unload()


@pytest.fixture
def sent(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The messages about weights from here on."""
    assert case.model.group is not None
    messages: list[dict[str, Any]] = []
    call = case.model.group.call

    def spy(operation: str, message: dict[str, Any], **options: Any) -> Any:
        if operation == "weights":
            messages.append(message)
        return call(operation, message, **options)

    monkeypatch.setattr(case.model.group, "call", spy)
    return messages


def predict(group: WorkerGroup, path: Path, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    model = RemoteModel(recipe_of(path, DEVICES, dtype), group=group)
    model.ensure_loaded()
    try:
        return model.step(*inputs.make())
    finally:
        model.unload()


@pytest.mark.parametrize(
    ("checkpoint", "inputs", "storage"),
    [
        pytest.param({}, Inputs(), torch.float32, id="hunyuan_video"),
        pytest.param({"names": "original", "prefix": "model.model."}, Inputs(), torch.float32, id="original_names"),
        pytest.param({"dtype": torch.bfloat16}, Inputs(), torch.bfloat16, id="bf16"),
        pytest.param({}, Inputs(), fp8, id="fp8"),
        pytest.param({"family": "flux"}, FLUX_INPUTS, torch.float32, id="flux"),
        pytest.param({"family": "flux"}, FLUX_INPUTS, fp8, id="flux_fp8"),
        *(
            pytest.param({"scaled": layout, "dtype": torch.bfloat16}, Inputs(), torch.float32, id=layout)
            for layout in SCALED_LAYOUTS
        ),
        pytest.param({"scaled": "comfy_quant"}, Inputs(), fp8, id="scaled_and_fp8_chosen"),
        pytest.param({"family": "flux", "scaled": "marker_2"}, FLUX_INPUTS, torch.float32, id="flux_scaled"),
    ],
)
def test_replaced_weights_give_what_a_checkpoint_with_them_gives(
    start_group: StartGroup,
    tiny_models: TinyModels,
    tmp_path: Path,
    checkpoint: dict[str, Any],
    inputs: Inputs,
    storage: torch.dtype,
):
    """Every tensor of the file, so that none of them goes to a wrong place."""
    group, path = start_group(DEVICES), tiny_models.path(**checkpoint)
    names = write_changed(path, tmp_path / "changed.safetensors", storage)
    expected = predict(group, tmp_path / "changed.safetensors", inputs, storage)
    model = RemoteModel(recipe_of(path, DEVICES, storage), group=group)
    model.ensure_loaded()
    base = model.step(*inputs.make())
    model.replace_weights("changed", names, change)
    changed = model.step(*inputs.make())
    model.replace_weights(None, (), change)
    restored = model.step(*inputs.make())
    model.unload()
    assert torch.equal(changed, expected)
    assert torch.equal(restored, base)
    assert not torch.equal(changed, base)


@pytest.mark.parametrize("family", ["hunyuan_video", "flux"])
def test_a_diffusers_folder_takes_the_replacements_of_the_single_file(
    start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, family: str
):
    inputs = FLUX_INPUTS if family == "flux" else Inputs()
    group, path = start_group(DEVICES), tiny_models.path(family)
    recipe = {"path": str(path), "weight_dtype": "float32", "compute_dtype": "float32"}
    stock: Any = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model
    stock.save_pretrained(tmp_path)
    results = []
    for checkpoint in (path, tmp_path):
        model = RemoteModel(recipe_of(checkpoint, DEVICES), group=group)
        model.ensure_loaded()
        base = model.step(*inputs.make())
        model.replace_weights("changed", SOME, change)
        results.append(model.step(*inputs.make()))
        model.replace_weights(None, (), change)
        assert torch.equal(model.step(*inputs.make()), base)
        assert not torch.equal(results[-1], base)
        model.unload()
    assert torch.equal(*results)


def test_each_replacement_starts_from_the_checkpoint(case: Case, tiny_models: TinyModels):
    seen: dict[str, Tensor] = {}

    def look(name: str, stored: Stored) -> Stored:
        seen[name] = stored.tensor.clone()
        return change(name, stored, 0.5)

    case.replace("half", SOME, 0.5)
    half = case.step()
    case.replace("other", [QKV, "single_blocks.0.linear2.weight"], -0.7)
    assert not torch.equal(case.step(), half)
    case.model.replace_weights("half again", SOME, look)
    assert torch.equal(case.step(), half)
    stored = load_file(tiny_models.path())
    assert seen.keys() == set(SOME)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in seen.items())


def test_only_what_changes_travels(case: Case, sent: list[dict[str, Any]]):
    def touched() -> tuple[set[str], set[str]]:
        """Names of the tensors that travelled, and of those that the workers took from the file."""
        put = {name for message in sent for name in message["put"]}
        restored = {name for message in sent for name in message["restore"]}
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
    case.replace("second", [QKV], 0.5)
    assert touched() == ({QKV}, set(SOME) - {QKV})
    case.replace(None, ())
    assert touched() == (set(), {QKV})


def test_shared_memory_holds_a_few_weights_at_a_time(
    case: Case, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    case.replace("at once", SOME)
    expected = case.step()
    assert len(sent) == 1
    case.replace(None, ())
    sent.clear()
    limit = 1 << 20
    monkeypatch.setattr(remote_weights, "_BATCH_BYTES", limit)
    told: list[tuple[int, int]] = []
    case.replace("in parts", SOME, on_progress=lambda done, total: told.append((done, total)))
    assert torch.equal(case.step(), expected)
    stored = load_file(case.model.recipe.path)
    sizes = [sum(stored[name].nbytes for name in message["put"]) for message in sent]
    assert len(sizes) > 1
    assert all(size <= limit or len(message["put"]) == 1 for size, message in zip(sizes, sent, strict=True))
    total = sum(stored[name].nbytes for name in SOME)
    assert [done for done, _ in told] == [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert {entry[1] for entry in told} == {total}


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
    assert case.model.group is not None
    case.replace("first", SOME)
    expected = case.step()
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == len(SOME) + 3:
            raise Cancelled

    slow = case.model.group.pids[0]
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

    def fail(name: str, stored: Stored) -> Stored:
        raise KeyError(name)

    with pytest.raises(KeyError):
        case.model.replace_weights("broken", SOME, fail)
    case.replace(None, ())
    assert torch.equal(case.step(), base)


def test_a_checkpoint_that_went_away_is_named(start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path):
    path = tmp_path / "moved.safetensors"
    path.write_bytes(tiny_models.path().read_bytes())
    group = start_group(DEVICES)
    model = RemoteModel(recipe_of(path, DEVICES), group=group)
    model.ensure_loaded()
    base, pids = model.step(*Inputs().make()), group.pids
    model.replace_weights("changed", SOME, change)
    path.rename(tmp_path / "away.safetensors")
    with pytest.raises(WorkerError, match=r"moved\.safetensors: cannot read") as caught:
        model.replace_weights(None, (), change)
    assert caught.value.remote_type == "CheckpointError"
    (tmp_path / "away.safetensors").rename(path)
    model.replace_weights(None, (), change)
    assert torch.equal(model.step(*Inputs().make()), base)
    assert group.pids == pids  # an error of all workers alike leaves them running
    model.unload()


def test_loading_again_starts_from_the_checkpoint(case: Case, sent: list[dict[str, Any]]):
    base = case.step()
    case.replace("changed", SOME)
    changed = case.step()
    case.model.unload()
    case.model.ensure_loaded()
    assert torch.equal(case.step(), base)
    sent.clear()
    case.replace("changed", SOME)
    assert {name for message in sent for name in message["put"]} == set(SOME)
    assert torch.equal(case.step(), changed)


def test_fresh_workers_are_given_the_weights_again(tiny_models: TinyModels):
    layout = resolve(SequenceParallelConfig(devices=on_ranks(DEVICES)))
    groups = [WorkerGroup(layout, threads=1) for _ in range(2)]
    results = []
    try:
        model = RemoteModel(recipe_of(tiny_models.path(), DEVICES), group=groups[0])
        for group in groups:
            group.start()
            model._own_group = group
            model.ensure_loaded()
            model.replace_weights("changed", SOME, change)
            results.append(model.step(*Inputs().make()))
            group._workers[-1].process.kill()
            assert wait_until(lambda group=group: not group.alive, seconds=5)
            with pytest.raises(WorkerDiedError):
                model.replace_weights(None, (), change)
            assert not model.loaded
    finally:
        for group in groups:
            group.stop()
    assert torch.equal(*results)
