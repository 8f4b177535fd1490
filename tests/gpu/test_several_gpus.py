"""Two GPUs against one: every kind of exchange, over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import recipe
from parallel.diffusers.tiny import tiny_request, write_tiny
from parallel.host import running
from parallel.host.remote_model import RemoteModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

ROOT = Path(__file__).parents[2]
ONE, TWO = "cuda:0", "cuda:0,cuda:1"
NETWORK = "HunyuanVideoTransformer3DModel"

PLANS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"cfg_degree": 2},
    "shard": {"weights": "shard"},
    "offload": {"weights": "offload"},
    "unequal_speeds": {"devices": "cuda:0*3,cuda:1"},
}


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    yield
    running.stop_all()


@pytest.mark.parametrize("plan", PLANS)
def test_two_gpus_agree_with_one(tmp_path: Path, plan: str):
    """Twice, as the second step finds everything warm; three heads and odd numbers of tokens."""
    path = tmp_path / "tiny"
    write_tiny(path, NETWORK, heads=3)
    for alone, together in zip(predictions(path, {}, ONE), predictions(path, PLANS[plan], TWO), strict=True):
        assert ((together - alone).abs().max() / alone.abs().max()) <= 1e-3  # TF32 is off by default


def predictions(path: Path, plan: dict[str, Any], devices: str) -> list[Tensor]:
    """Of the positive and the negative prompt, which are of unequal length; two steps."""
    prompts = [tiny_request(NETWORK, frames=3, height=10, width=6, text=text) for text in (7, 3)]
    model = RemoteModel(recipe(str(path), SequenceParallelConfig(**{"devices": devices, **plan})))
    model.weights.ensure_loaded()
    found: list[Tensor] = []
    for time in (900.0, 500.0):
        requests = [replace(prompt, timestep=torch.tensor([time]), label=str(i)) for i, prompt in enumerate(prompts)]
        found += model.steps(requests, conditions=2)
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["--pipeline", "2"],  # the exchange of one half of the heads beside the attention of the other
        ["--pipeline", "2", "--heads", "3", "--tokens", "8191", "--text", "7"],
        ["--ring-degree", "2", "--tokens", "8191"],
    ],
    ids=["pipelined", "uneven", "ring"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_attention_over_two_gpus(options: list[str], dtype: str):
    command = [sys.executable, "-m", "parallel", "bench", "attention", "--devices", TWO, "--dtype", dtype, "--json"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["max_abs_err"] <= (1e-4 if dtype == "float32" else 2e-2)
