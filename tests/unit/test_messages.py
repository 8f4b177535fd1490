"""Messages to workers: what one side writes, the other one reads."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from parallel.compilation.settings import CompileSettings
from parallel.degrees import Degrees
from parallel.wire import messages
from parallel.wire.shared import TensorRef
from parallel.wire.trees import flatten, restore
from parallel.wire.typed import from_plain

PLACE = TensorRef("step", 64, (1, 2), "bfloat16")
REQUEST = messages.Request(
    x=PLACE, timestep=PLACE, out=PLACE, conditioning={"context": "model-1/3"}, label="[0]",
    arguments={"dict": {"args": {"list": [{"tensor": "x"}, 3.5]}, "named": {"dict": {}}}}, parts=[[4, 2], [8]],
)  # fmt: skip
COMMON: dict[str, Any] = {
    "model": "model-1",
    "conditioning": messages.Conditioning(put={"model-1/3": PLACE}, drop=["model-1/1"]),
    "cache": messages.CacheRule(sampling=3, rule={"kind": "first_block", "threshold": 0.1}, active=True),
    "compile": CompileSettings(dynamic=False),
}
MESSAGES = [
    messages.Load(
        model="model-1", recipe={"path": "a"}, home=messages.WeightsHome(mode="shard", sharing=2), fp8={"skip": []}
    ),
    messages.Load(model="model-1", recipe={}, home=messages.WeightsHome(mode="replicate", sharing=1), fp8=None),
    messages.Weights(model="model-1", put={"a.weight": [PLACE, PLACE]}, restore=["b.weight"]),
    messages.Step(degrees=Degrees(ulysses=2, cfg=2), requests=[REQUEST], **COMMON),
    messages.Step(degrees=Degrees(), requests=[], **COMMON | {"cache": None, "compile": None}),
    messages.Sample(
        degrees=[Degrees(ring=2)], size=2, constants={"0": PLACE}, free=[[], [0], []], result=[[1.0, [2]]], out=PLACE,
        program=[
            messages.RunNetwork(
                passes=[messages.Pass(request=REQUEST, latents=[0], results=[1])], degrees=0, active=False
            ),
            messages.Evaluate(evaluate=2, terms=[[0.5, [0, 1]]]),
            messages.Report(step=0, steps=1, denoised=[[1.0, [1]]], x=[]),
        ],
        previews=messages.Previews(wanted=PLACE, shown=PLACE, latents=[[PLACE, PLACE]] * 2, interval_s=1),
        kept=messages.KeptState(places={"2": [1]}, latents=[[PLACE], [PLACE]], done=PLACE),
        **COMMON,
    ),
    messages.Tile(
        vae="vae-1", direction="decode", x=PLACE, shape=[1, 2], stride=[2, 1], out=messages.Room(segment="o", size=8)
    ),
    messages.FreeMemory(),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_a_message_is_read_as_it_was_written(message: messages.Operation):
    assert messages.read(json.loads(json.dumps(message.to_json()))) == message


def test_every_operation_has_a_name_of_its_own():
    assert len(messages.OPERATIONS) == len(set(messages.OPERATIONS.values())) > 15
    assert all(dataclasses.is_dataclass(kind) for kind in messages.OPERATIONS.values())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vae": 3}, "Tile.vae is 3, and should be"),
        ({"shape": "12"}, "Tile.shape is '12'"),
        ({"shape": [1, "2"]}, "Tile.shape is '2'"),
        ({"out": None}, "Tile.out: None has not the fields segment, size, offset"),
        ({"further": 1}, "Tile: .* has not the fields vae, direction"),
        ({"x": {"segment": "s", "offset": 0, "shape": [2], "dtype": "complex64"}}, "'complex64' cannot travel"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], complaint: str):
    written = MESSAGES[-2].to_json()
    written["arguments"] |= changes
    with pytest.raises((TypeError, ValueError), match=complaint):
        messages.read(written)


@pytest.mark.parametrize(
    "message",
    [{}, {"op": 3}, {"op": []}, {"op": None}, {"op": "dance"}, {"op": "free memory"}, {"op": "step", "arguments": []}],
    ids=str,
)
def test_what_is_no_operation_is_refused(message: dict[str, Any]):
    with pytest.raises(TypeError, match=r"is no operation|has not the fields"):
        messages.read(message)


def test_a_refusal_is_short_whatever_is_refused():
    deep: Any = 0
    for _ in range(900):
        deep = [deep]
    for wrong in (deep, list(range(100_000)), "x" * 1_000_000, {str(i): i for i in range(10_000)}):
        with pytest.raises(TypeError) as refused:
            messages.read({"op": "echo", "arguments": {"x": wrong, "out": wrong}})
        assert len(str(refused.value)) < 500


def test_a_number_that_is_no_float_is_refused():
    written = MESSAGES[-3].to_json()
    written["arguments"]["previews"]["interval_s"] = 10**400
    with pytest.raises(TypeError, match=r"Sample\.previews\.interval_s is 1000"):
        messages.read(written)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -1},
        {"shape": [-1]},
        {"shape": [2, -2, -2]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [0, 1 << 62, 1 << 62]},
        {"shape": [1] * 65},
        {"shape": [10**4000] * 64},
        {"offset": 1 << 63},
        {"dtype": "complex64"},
        {"dtype": "__class__"},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_a_place_that_no_tensor_can_have_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"too large|at least 0|cannot travel"):
        from_plain(TensorRef, {"segment": "s", "offset": 0, "shape": [2], "dtype": "float32"} | wrong)


# --- nests ------------------------------------------------------------------------------------------------------------


def test_a_nest_comes_back_with_its_tensors():
    tensors: dict[str, torch.Tensor] = {}
    nest = {"a": [1, 2.5, None, True, "σ", (torch.ones(2), [])], "b": {"c": {1, 2}}}
    tree = json.loads(json.dumps(flatten(nest, "x", tensors)))
    assert restore(tree, tensors.__getitem__) == nest


@pytest.mark.parametrize(
    "tree",
    [
        [], {}, {"list": [], "dict": {}}, {"code": "x"}, {"list": {}}, {"tuple": "abc"}, {"list": [[1]]}, {"dict": []},
        {"dict": {"a": {"list": None}}}, {"tensor": "none"}, {"tensor": 3}, {"tensor": []}, {"set": [[1]]},
        {"set": "abc"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_nest_is_refused(tree: Any):
    with pytest.raises(ValueError, match=r"nest|there is no tensor"):
        restore(tree, {}.__getitem__)


def test_a_nest_that_is_too_deep_is_refused():
    tree: Any = 0
    for _ in range(100_000):
        tree = {"list": [tree]}
    with pytest.raises(ValueError, match="too deeply"):
        restore(tree, {}.__getitem__)
