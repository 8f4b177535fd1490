"""Messages to workers: what one side writes, the other one reads."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from parallel.compilation.settings import CompileSettings
from parallel.degrees import Degrees
from parallel.wire import messages
from parallel.wire.shared import TensorRef

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
