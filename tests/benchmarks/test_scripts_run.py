"""The GPU benchmarks at toy size: they must still run on the day a GPU is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_gpu_hunyuan_video_runs_at_toy_size(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu_hunyuan_video", "--toy", "--output", str(tmp_path)],
        cwd=ROOT,
        check=True,
    )
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    steps = result["seconds_per_step"]
    assert steps["stock diffusers, masked"] > 0
    assert steps["one rank, auto"] > 0
    assert all(steps[f"share of rank 0 of {world}"] > 0 for world in (2, 4, 8))
