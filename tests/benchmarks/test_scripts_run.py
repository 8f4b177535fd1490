"""The benchmarks and the soak at toy size: they must still run on the day they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.extended
def test_gpu_hunyuan_video_runs_at_toy_size(tmp_path: Path):
    script = [sys.executable, "-m", "tests.benchmarks.gpu_hunyuan_video", "--toy", "--output", str(tmp_path)]
    subprocess.run(script, cwd=ROOT, check=True)
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    steps = result["seconds_per_step"]
    assert result["fp8"] in ("weight_only", "dynamic_rowwise")
    assert result["text"][1] < result["text"][0], "the text was padded"
    assert list(steps) == [
        "diffusers",
        "one rank",
        *(f"share of rank 0 of {world}" for world in (2, 4, 8)),
        "one rank + cache hit",
        "one rank + FP8",
        "one rank + FP8 + cache hit",
    ]
    assert all(seconds > 0 for seconds in steps.values())
    assert all(result["tflops"][name] > 0 for name in ("product", "attention, auto", "attention, sdpa"))


@pytest.mark.extended
def test_cpu_flux_context_parallel_runs_at_toy_size():
    script = [sys.executable, "-m", "tests.benchmarks.cpu_flux_context_parallel"]
    toy = ["--rounds", "1", "--image", "16", "--text", "2", "--layers", "1"]
    done = subprocess.run([*script, *toy], cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert set(result["ms_per_layer_above_half"]) == {
        "diffusers context parallel",
        "this engine",
        "this engine through gloo",
    }
    assert all(ms > 0 for ms in result["ms"].values())


def test_gpu_offload_runs_at_toy_size():
    script = [sys.executable, "-m", "tests.benchmarks.gpu_offload", "--toy"]
    done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"]
    assert result["time"] > 0


@pytest.mark.extended
def test_bench_start_tells_where_the_time_goes():
    script = [sys.executable, "-m", "parallel", "bench", "start", "--devices", "cpu", "--rounds", "1", "--json"]
    done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    for way in ("overlapped", "in_turn"):
        assert list(result[way]["start"]) == ["python", "torch", "device", "meeting"]
        assert result[way]["load"]["libraries"] >= 0 and result[way]["load"]["weights"] > 0
        assert result[way]["total"] > result[way]["start"]["torch"] > 0
    assert "until the first step" in done.stdout


def test_a_short_soak():
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--prompts", "4"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    assert result["prompts"] == sum(result["trouble"].values()) == 4
    assert result["wrong"] == [] and result["hung"] == 0


def test_hooks_are_timed():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.hooks"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "HunyuanVideoTransformer3DModel, 60 blocks" in done.stdout
