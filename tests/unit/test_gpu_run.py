"""`make gpu` where there is no GPU: its toy, its limits, README's table of its results, and what is said of GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import devices
from tests.distributed.process_facts import is_running, wait_until
from tests.gpu import faulty_boot, run, sample, table
from tests.gpu.run import Part, run_part, summary

ROOT = Path(__file__).parents[2]


FAULTS = "faults"
"""Its workers are started again after each fault, which takes a minute on CPUs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([part.name for part in run.PARTS if part.name != FAULTS], id="without faults"),
        pytest.param([FAULTS], id="faults", marks=pytest.mark.extended),
    ],
)
def test_the_toy_passes_without_a_gpu(tmp_path: Path, parts: list[str]):
    environment = {name: value for name, value in os.environ.items() if name != devices.VARIABLE}
    command = [sys.executable, "-m", "tests.gpu.run", "--toy", "--output", str(tmp_path)]
    command += [word for part in parts for word in ("--only", part)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert {name: part["outcome"] for name, part in result["parts"].items()} == dict.fromkeys(
        ["machine", *parts], "passed"
    )
    assert result["versions"]["torch"] and result["hardware"]["cores"]
    if parts == [FAULTS]:
        tests = result["parts"][FAULTS]["tests"]
        assert tests["passed"] >= 7 and list(tests["skipped"]) == ["no CUDA ranks"]
        return
    assert set(result["parts"]["sample"]["tests"]["features"].values()) == {"passed"}
    assert set(result["parts"]["exchanges"]["figures"]) == {"meet", "uneven", "empty", "all_reduce", "neighbours"}
    assert all(len(worlds) == 4 for worlds in result["parts"]["shares"]["figures"].values())


@pytest.mark.slow
def test_a_fault_that_was_ordered_happens():
    """One of those that need no GPU, in the plain run."""
    environment = os.environ | {"SEQUENCE_PARALLEL_GPU_TOY": "1"}
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_faults.py", "-k", "memory and one", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "tests.gpu.run", "--minutes", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no CUDA device here; --toy runs what needs none" in done.stderr


@pytest.mark.slow
def test_every_feature_of_the_sample_has_tests():
    """On the whole list; the plugin refuses a feature that has none."""
    command = [*run._sample("cpu", False), "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len({feature.name for feature in sample.FEATURES}) == len(sample.FEATURES)


def python(code: str) -> Part:
    return Part("a part", 1.0, lambda kind, toy: [sys.executable, "-c", code])


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pid = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "print('{\"known\": 1}')\nprint('a line', flush=True)\ntime.sleep(600)\n"
    )
    began = time.monotonic()
    found = run_part(python(code), "cpu", True, 5, dict(os.environ))
    assert found["outcome"] == "out of time" and found["figures"] == {"known": 1}
    assert time.monotonic() - began < 60
    assert "a line" in capfd.readouterr().out
    assert wait_until(lambda: not is_running(int(pid.read_text())), 10)


def test_a_part_that_fails_is_told(capfd: pytest.CaptureFixture[str]):
    found = run_part(python("raise SystemExit('no such thing')"), "cpu", True, 60, dict(os.environ))
    assert found["outcome"] == "failed"
    assert "no such thing" in capfd.readouterr().out


def test_a_summary_has_what_failed_and_why():
    tests = [
        {"test": "a", "outcome": "passed", "printed": "1.5 times\n", "feature": "ring"},
        {"test": "b", "outcome": "failed", "printed": "", "why": "assert 1 == 2", "feature": "ring"},
        {"test": "c", "outcome": "skipped", "printed": "", "why": "no GPU"},
        {"test": "d", "outcome": "passed", "printed": "", "feature": "even"},
    ]
    assert summary(tests) == {
        "passed": 2,
        "failed": {"b": "assert 1 == 2"},
        "skipped": {"no GPU": 1},
        "features": {"ring": "failed, passed", "even": "passed"},
        "printed": {"a": "1.5 times"},
    }


def test_faults_are_told_to_the_ranks_they_are_for(tmp_path: Path):
    faulty_boot.order(tmp_path, faulty_boot.OUT_OF_MEMORY, 0, 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("02", "out of memory")


# --- what is said -------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "date": "2026-01-02",
    "toy": False,
    "hardware": {"gpus": [{"name": "NVIDIA X1"}, {"name": "NVIDIA X1"}, {"name": "NVIDIA X2"}]},
    "versions": {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.9", "driver": None},
    "parts": {
        "faults": {"outcome": "failed", "tests": {"passed": 8, "failed": {"a": "b"}}},
        "shares": {
            "outcome": "passed",
            "figures": {"FLUX": {"1": {"ms_per_step": 812.4, "peak_gib": 5.25}, "2": {"failed": "out of memory"}}},
        },
    },
}


def test_the_table_shows_what_was_recorded():
    text = table.as_markdown([RUN])
    assert "| 2 × NVIDIA X1 and 1 × NVIDIA X2 | 2026-01-02 | 2.13.0, 13.0, 2.28.9, None |" in text
    assert "faults: failed, 8 tests passed, 1 failed; shares: passed |" in text
    assert "| FLUX | 2 × NVIDIA X1 and 1 × NVIDIA X2 | 812 (5.2 GiB) | out of memory |  |  |" in text


def test_no_toy_gets_into_the_table(tmp_path: Path):
    (tmp_path / "gpu-a-2026-01-02.json").write_text(json.dumps(RUN | {"toy": True}))
    assert table.read(tmp_path) == []
    assert table.as_markdown([]) == table.NOTHING
    (tmp_path / "gpu-b-2026-01-02.json").write_text(json.dumps(RUN))
    assert table.read(tmp_path) == [RUN]


def test_readme_shows_the_recorded_results():
    assert table.main(["--check"]) == 0
    assert table.put(f"a {table.BEGIN} old {table.END} b", "new") == f"a {table.BEGIN}\nnew\n{table.END} b"


SAID = re.compile(
    r"not (yet )?(been )?(run|tried|tested|measured)( yet)? on (a |an |any |several )?(GPU|CUDA|NVIDIA)"
    r"|(not|never) yet (been )?(run|measured)|awaits? a measurement",
    re.IGNORECASE,
)


def test_what_has_not_run_on_a_gpu_is_said_in_one_place():
    """README's section; sentences elsewhere outlive what they say."""
    files = [
        path
        for folder, suffixes in {
            "parallel": ".py", "nodes": ".py", "tests": ".py", "js": ".md.js", "locales": ".json", "workflows": ".json"
        }.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix and path.suffix in suffixes
    ]  # fmt: skip
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    assert len(files) > 150
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in SAID.finditer(re.sub(r"\s+", " ", path.read_text()))
        if path != Path(__file__)
    ]
    assert found == []
    assert "**Not run, or not recorded:**" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", ["Not yet run on a GPU.", "has not yet been run on a GPU", "awaits a measurement"])
def test_such_a_sentence_would_be_found(text: str):
    assert SAID.search(text)
