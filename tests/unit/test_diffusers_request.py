"""Calls of diffusers' transformers as plain data, and the tiny ones that stand for real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import NetworkFile, recipe
from parallel.diffusers.request import request
from parallel.diffusers.tiny import TINY, tiny_request, write_tiny
from parallel.host.remote_model import RemoteModel
from parallel.sampling.step_request import StepRequest
from parallel.wire.trees import NotPlain, restore

FILE = "diffusion_pytorch_model.safetensors"
FLUX, WAN = TINY[1], TINY[2]
X, T = torch.zeros(2, 4), torch.ones(2)


def arguments(made: StepRequest) -> Any:
    """By name, as a worker gives them to `forward`."""
    tensors = {"x": made.x, "timestep": made.timestep, **made.conditioning}
    restored = restore(made.arguments, tensors.__getitem__)
    assert restored["args"] == []
    return restored["named"]


def test_arguments_arrive_as_they_were_given() -> None:
    cos, sin, text = torch.ones(3), torch.zeros(3), torch.ones(2, 5)
    made = request(
        X, T, label="cond", encoder_hidden_states=text, rope=(cos, sin), kwargs={"scale": 0.5}, guidance=None
    )
    named = arguments(made)
    assert named.keys() == {
        "hidden_states", "timestep", "return_dict", "encoder_hidden_states", "rope", "kwargs"
    }, "what was not given is left out"  # fmt: skip
    assert named["hidden_states"] is X and named["timestep"] is T and named["return_dict"] is False
    assert named["encoder_hidden_states"] is text
    assert isinstance(named["rope"], tuple) and named["rope"][1] is sin and named["kwargs"] == {"scale": 0.5}
    assert set(made.conditioning) == {"encoder_hidden_states", "rope.0", "rope.1"}
    assert made.label == "cond"


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(NotPlain, match=r"joint_attention_kwargs\.hook is a function"):
        request(X, T, joint_attention_kwargs={"hook": lambda x: x})


@pytest.mark.parametrize("network", TINY)
def test_a_tiny_one_takes_its_request_and_gives_as_much_as_the_host_expects(tmp_path: Path, network: str) -> None:
    write_tiny(tmp_path / "tiny", network, heads=1)
    made = tiny_request(network, frames=3, height=6, width=10, text=5, batch=2, label="a")
    built, _ = NetworkFile(str(tmp_path / "tiny"), None, torch.device("cpu")).network()
    with torch.no_grad():
        (prediction,) = built(**arguments(made))
    model = RemoteModel(recipe(str(tmp_path / "tiny"), SequenceParallelConfig(devices="cpu")))
    assert tuple(prediction.shape) == model.output_shape(made)
    assert prediction.isfinite().all() and 0.1 < prediction.std() < 10, "of a size that shows differences"


def test_a_seed_gives_the_same_weights_and_inputs(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny(tmp_path / name, WAN, heads=1, seed=seed)
    a, b, c = (load_file(tmp_path / name / FILE)["proj_out.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(tiny_request(FLUX).x, tiny_request(FLUX).x)
    assert not torch.equal(tiny_request(FLUX, seed=1).x, tiny_request(FLUX).x)
