"""`parallelize`: diffusers' own transformers over several ranks, against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.devices import rank_environment
from tests.distributed.start_ranks import ROOT, run_ranks

ALLOWED = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, *(pytest.param(each, marks=pytest.mark.extended) for each in (2, 4))])
def test_results_and_gradients_are_those_of_one_process(world: int, tmp_path: Path):
    results = [
        json.loads(text) for text in run_ranks("tests.distributed.parallelized_ranks", world, tmp_path, timeout=280)
    ]
    assert results[0].keys() == results[-1].keys() and len(results[0]) >= 66
    wrong = {
        f"rank {rank}: {name}": found
        for rank, of_rank in enumerate(results)
        for name, found in of_rank.items()
        if not (found["result"] <= ALLOWED and found["gradients"] <= ALLOWED and found["removed"] == 0)
    }
    assert not wrong


SCRIPT = """
import torch, torch.distributed as dist, diffusers
from torch.distributed.device_mesh import init_device_mesh
from parallel.parallelize import parallelize
from tests.distributed.parallelized_ranks import CASES, difference, made

dist.init_process_group("gloo")
case = CASES[0]
model, inputs = made(case, 4), case.inputs(4)
with torch.no_grad():
    alone = model(**inputs).sample
    parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert difference(model(**inputs).sample, alone) <= 1e-5
# one write: two ranks share the pipe
print(f"rank {dist.get_rank()} of {dist.get_world_size()} agrees\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**rank_environment(0), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 2 agrees") == 2
