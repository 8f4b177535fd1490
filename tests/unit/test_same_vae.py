"""How two processes find out whether they have the same VAE and the same settings."""

from __future__ import annotations

import enum
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from parallel.vae.arguments import as_plain, restore
from parallel.vae.fingerprint import fingerprint, first_difference


class Network(nn.Module):
    def __init__(self, scale: float = 1.0, width: int = 4, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.scale = scale
        self.layer = nn.Conv2d(width, 4, 3, dtype=dtype)


def test_the_same_network_is_the_same_whatever_its_values():
    one, other = Network(), Network()
    one.model_loaded_weight_memory = 5  # as ComfyUI's ModelPatcher leaves it
    one.layer.weight_function = []
    assert first_difference(fingerprint(one), json.loads(json.dumps(fingerprint(other)))) is None


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Network(scale=2.0), "scale=2.0"),
        (Network(width=8), "layer would be Conv2d"),
        (Network(dtype=torch.bfloat16), "layer.weight would be .* torch.bfloat16"),
        (nn.Sequential(Network()), "the network would be Sequential"),
    ],
)
def test_differences_are_named(other, named):
    difference = first_difference(fingerprint(Network()), fingerprint(other))
    assert difference is not None and re.search(named, difference), difference


class Feature(enum.Enum):
    AUTOTUNE = "autotune"
    FAST = "fast"


def test_arguments_survive_the_wire():
    arguments = {
        "cpu": True, "reserve_vram": 1.5, "preview": Feature.FAST, "fast": {Feature.AUTOTUNE}, "paths": ["a", "b"],
        "none": None, "callback": print,
    }  # fmt: skip
    sent = json.loads(json.dumps(as_plain(arguments)))
    del arguments["callback"]
    assert restore(sent, SimpleNamespace(Feature=Feature)) == arguments
