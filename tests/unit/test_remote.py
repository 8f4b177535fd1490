"""What the host knows and does without any worker: sizes, splits, and which replaced weights travel when."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.config import SequenceParallelConfig
from parallel.degrees import Degrees
from parallel.diffusers.folder import recipe
from parallel.diffusers.request import request
from parallel.diffusers.tiny import TINY, write_tiny
from parallel.errors import StepCancelled
from parallel.host import remote_weights
from parallel.host.memory import GroupMemory
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.host.remote_weights import RemoteWeights
from parallel.quantise.settings import FP8Settings
from parallel.wire.messages import Weights
from parallel.wire.shared import Segment

WAN, COGVIDEOX = TINY[2], TINY[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "wan"
    write_tiny(path, WAN, num_layers=1)
    return path


def of(folder: Path, devices: str = "cpu,cpu", **options: Any) -> Recipe:
    return recipe(str(folder), SequenceParallelConfig(devices=devices, **options))


# --- sizes --------------------------------------------------------------------------------------------------------


def test_what_comfyui_is_to_make_room_for(folder: Path) -> None:
    """Before anything is loaded."""
    whole = of(folder).nbytes
    assert RemoteWeights(of(folder)).expected_bytes() == whole
    sharded = RemoteWeights(of(folder, weights="shard"))
    assert sharded.sharded and sharded.expected_bytes() == -(-whole // 2)
    fp8 = FP8Settings(scheme="weight_only")
    weights = RemoteWeights(of(folder))
    assert weights.expected_bytes(fp8) == whole - weights.select_fp8(fp8).saved < whole
    assert weights.nbytes == 0 and not weights.loaded


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [(WAN, (1, 16, 2, 8, 8), (1, 16, 2, 8, 8)), (WAN, (1, 36, 2, 8, 8), (1, 16, 2, 8, 8)),
     (COGVIDEOX, (1, 2, 32, 8, 8), (1, 2, 16, 8, 8))],
)  # fmt: skip
def test_channels_that_a_model_class_has_put_behind_the_latent_are_not_predicted(
    tmp_path: Path, network: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    write_tiny(tmp_path / "tiny", network, heads=1, num_layers=1)
    assert RemoteModel(of(tmp_path / "tiny")).output_shape(request(torch.zeros(shape), torch.ones(1))) == expected


# --- splits -------------------------------------------------------------------------------------------------------

TEXT, IMAGE = torch.zeros(2, 5, 64), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"encoder_hidden_states": TEXT}, Degrees(dp=2)),
        ({"encoder_hidden_states": TEXT[:1]}, Degrees(dp=2)),
        ({"encoder_hidden_states": TEXT, "transformer_options": {"sample_sigmas": torch.ones(9)}}, Degrees(dp=2)),
        ({"encoder_hidden_states": TEXT, "encoder_hidden_states_image": IMAGE}, Degrees(ulysses=2)),
        ({"encoder_hidden_states": TEXT, "kwargs": {"image": TEXT}}, Degrees(ulysses=2)),
    ],
)
def test_batch_groups_do_not_take_apart_what_may_be_no_batch(
    folder: Path, named: dict[str, Any], expected: Degrees
) -> None:
    """What has neither one row nor one of each sample, and what a model has made of itself."""
    model = RemoteModel(of(folder, dp_degree=2))
    assert model.degrees(1, [request(torch.zeros(2, 16, 2, 8, 8), torch.ones(2), **named)]) == expected


def test_a_sample_that_is_not_taken_apart_keeps_its_group(folder: Path) -> None:
    """Cond and uncond, each whole on a rank."""
    model = RemoteModel(of(folder, cfg_degree=2))
    each = request(torch.zeros(1, 16, 2, 8, 8), torch.ones(1), kwargs={"image": IMAGE})
    assert model.degrees(2, [each, each]) == Degrees(cfg=2)


# --- replaced weights ---------------------------------------------------------------------------------------------


class Workers(GroupMemory):
    """Stands for a group: notes what it is asked, and has the values that it was sent."""

    alive = True

    def __init__(self) -> None:
        super().__init__()
        self.memory = self
        self.asked: list[tuple[list[str], list[str]]] = []
        self.sizes: list[int] = []
        self.fails = False

    def settle(self, poll: Any) -> None:
        pass

    def segment(self, name: str, size: int) -> Segment:
        self.sizes.append(size)
        return super().segment(name, size)

    def call(self, message: Weights, poll: Any = None) -> list[dict[str, Any]]:
        if self.fails:
            raise RuntimeError("a worker failed")
        self.asked.append((list(message.put), message.restore))
        return []


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def weights(folder: Path, workers: Workers) -> RemoteWeights:
    """As if they were loaded."""
    made = RemoteWeights(of(folder))
    made.group = workers  # type: ignore[assignment]
    return made


def value(name: str) -> Tensor:
    return torch.zeros(4)


def replaced(weights: RemoteWeights, version: Any, names: Iterable[str], replace: Any = value) -> None:
    weights.replace(version, list(names), replace)


def test_only_what_changes_is_asked_for(weights: RemoteWeights, workers: Workers) -> None:
    replaced(weights, None, [])
    replaced(weights, 1, "ab")
    replaced(weights, 1, "ab")
    assert workers.asked == [(["a", "b"], [])]
    replaced(weights, 2, "bc")
    assert workers.asked[1:] == [([], ["a"]), (["b", "c"], [])], "each starts from the file's"
    replaced(weights, None, [])
    assert workers.asked[3:] == [([], ["b", "c"])]


def test_small_weights_travel_together_and_a_large_one_alone(
    weights: RemoteWeights, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_weights, "_BATCH_BYTES", 1000)
    sizes = {"a": 100, "b": 100, "c": 1000, "d": 10, "e": 240, "f": 1}  # of 4 bytes each
    done: list[tuple[int, int]] = []
    weights.replace(1, sizes, lambda name: torch.zeros(sizes[name]), on_progress=lambda *each: done.append(each))
    assert [put for put, _ in workers.asked] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert done == [(2, 6), (3, 6), (5, 6), (6, 6)]
    assert max(workers.sizes) < 2 * 4000


@pytest.mark.parametrize("where", ["making", "cancelled", "worker"])
def test_after_a_failure_everything_is_done_again(weights: RemoteWeights, workers: Workers, where: str) -> None:
    """Also by the version that was to be put, and by the one that was there before."""
    replaced(weights, 1, "a")

    def fail(name: str) -> Tensor:
        raise {"making": ValueError, "cancelled": StepCancelled}[where]("no")

    workers.fails = where == "worker"
    with pytest.raises((ValueError, StepCancelled, RuntimeError)):
        replaced(weights, 2, "ab", value if workers.fails else fail)
    workers.fails = False
    workers.asked.clear()
    replaced(weights, 1, "a")
    assert (["a"], []) in workers.asked
    workers.asked.clear()
    replaced(weights, None, [])
    assert "a" in workers.asked[0][1]


def test_weights_that_are_loaded_anew_are_the_files(weights: RemoteWeights, workers: Workers) -> None:
    replaced(weights, 1, "a")
    weights._forgotten()
    workers.asked.clear()
    replaced(weights, None, [])
    assert workers.asked == []
    replaced(weights, 1, "a")
    assert workers.asked == [(["a"], [])]
