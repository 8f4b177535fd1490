"""Predictions that are not finite: found in the workers, named once, and the workers stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.diffusers.tensors import mapped
from parallel.errors import NotFiniteError
from parallel.host import status
from parallel.host.remote_model import RemoteModel
from tests.distributed.events import heard
from tests.distributed.faults import Faults
from tests.distributed.faulty_boot import NOT_A_NUMBER
from tests.distributed.test_sampling import SETTINGS, Sampling
from tests.distributed.tiny_models import Inputs, StartGroup, TinyModels, loaded, recipe_of, step

SMALL = Inputs(valid=(5,))
WEIGHTS = {
    "transformer_blocks.0.norm1.linear.bias": r"in the output of block transformer_blocks\.0 \(1 of \d\) on worker"
    r" rank \d \(cpu, pid \d+\)\. Most often",
    "single_transformer_blocks.1.proj_out.bias": r"in the output of block single_transformer_blocks\.1 \(\d of \d\) on",
    "proj_out.bias": r"after the last of \d blocks on worker rank \d",
}
"""A weight that is NaN → what the message says."""


@pytest.fixture
def told() -> Iterator[list[status.Event]]:
    with heard(status.NOT_FINITE) as events:
        yield events


def broken(model: RemoteModel, name: str, value: float = float("nan")) -> None:
    tensor = mapped(model.recipe.path)[name]

    def replaced(_: str) -> Tensor:
        return torch.full_like(tensor, value)

    model.weights.replace(object(), [name], replaced)


@pytest.mark.parametrize("devices", ["cpu,cpu", pytest.param("cpu,cpu,cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_step_names_the_block(
    start_group: StartGroup, tiny_models: TinyModels, told: list[status.Event], devices: str, name: str
) -> None:
    with loaded(start_group(devices), tiny_models.path(heads=3, num_single_layers=4)) as model:
        right = step(model, SMALL).clone()
        group = model.weights.group
        assert group is not None
        pids = list(group.pids)
        broken(model, name)
        for _ in range(2):
            with pytest.raises(NotFiniteError, match=WEIGHTS[name]) as caught:
                step(model, SMALL)
        assert "float16" in str(caught.value) and "LoRA" in str(caught.value)
        assert [event.text for event in told] == [str(caught.value)] * 2, "once for each step that fails"
        model.weights.replace(None, (), lambda _: right)
        assert torch.equal(step(model, SMALL), right)
        assert group.pids == pids


@pytest.mark.parametrize(("devices", "degrees"), [("cpu", {}), ("cpu,cpu", {}), ("cpu,cpu", {"cfg_degree": 2})])
def test_a_sampling_names_step_and_block(
    start_group: StartGroup, tiny_models: TinyModels, told: list[status.Event], devices: str, degrees: dict[str, int]
) -> None:
    setting = SETTINGS["guided"]
    with loaded(start_group(devices), setting.model.path(tiny_models), **degrees) as model:
        program = Sampling(setting).record()
        right, _ = model.sample(program)
        broken(model, "single_transformer_blocks.0.proj_mlp.bias", float("inf"))
        with pytest.raises(
            NotFiniteError, match=r"after 0 of 4 steps .*first in the output of block single_transformer_blocks\.0"
        ):
            model.sample(program)
        assert len(told) == 1
        model.weights.replace(None, (), lambda _: right)
        assert torch.equal(model.sample(program)[0], right)


@pytest.mark.slow
@pytest.mark.cpu_ranks("a fault that is put into them")
def test_what_a_second_run_does_not_show_is_laid_to_caches(faults: Faults, tiny_models: TinyModels) -> None:
    faults.clear()
    model = RemoteModel(recipe_of(tiny_models.path(heads=3, num_single_layers=4), "cpu,cpu"))
    model.weights.ensure_loaded()
    right = step(model, SMALL).clone()
    faults.order(NOT_A_NUMBER, [1], place="before check", count=1)
    said = r"not finite .*A second run, .* without compiled blocks, gave finite values: remove"
    with pytest.raises(NotFiniteError, match=said):
        step(model, SMALL)
    assert torch.equal(step(model, SMALL), right), "the workers stay"
    model.weights.unload()


def test_inputs_that_are_no_numbers_are_named(start_group: StartGroup, tiny_models: TinyModels) -> None:
    request = SMALL.make()
    name = next(name for name, tensor in request.conditioning.items() if tensor.is_floating_point())
    request.conditioning[name].view(-1)[0] = float("nan")
    said = rf"already in the model's input '{name}'\. Look at"
    with (
        loaded(start_group("cpu,cpu"), tiny_models.path(heads=3, num_single_layers=4)) as model,
        pytest.raises(NotFiniteError, match=said),
    ):
        model.steps([request])
