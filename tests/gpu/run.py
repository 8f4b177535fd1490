"""Everything that this machine's GPUs can show, within minutes: `make gpu`, or `python -m tests.gpu.run [--minutes 8]`.

Needs a copy of the repository, and a Python with torch for CUDA, diffusers and pytest. Parts run in the order of their
importance, each in processes of its own, which are ended when its time is up. What they say is shown as it comes, and
kept in one JSON file under `tests/gpu/results`, from which README's table is made (`python -m tests.gpu.table`).
`--toy` runs what needs no GPU, on CPU ranks at toy sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu import record, sample

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PYTEST = [
    sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-p",
    "no:cacheprovider", "--disable-warnings", "-m", "not thousands", "-v", "-rf", "--tb=short",
    "-p", "tests.gpu.record",
]  # fmt: skip
"""With no configuration of the repository's: that one needs plugins."""
NEEDED = ("torch", "diffusers", "safetensors", "numpy", "pytest")


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Args:
        share: of the whole time, at most.
        command: makes the command; gets the kind of devices of ranks and whether this is the toy.
    """

    name: str
    share: float
    command: Callable[[str, bool], list[str]]


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _gpu_tests(kind: str, toy: bool) -> list[str]:
    order = ("test_one_gpu.py", "test_several_gpus.py", "test_fp8.py")
    files = [path for path in (ROOT / "tests" / "gpu").glob("test_*.py") if path.name != "test_faults.py"]
    files.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    return [*PYTEST, *map(str, files)]


def _sample(kind: str, toy: bool) -> list[str]:
    # Files that no feature names may need packages that are not here.
    features = [feature for feature in sample.FEATURES if feature.toy or not toy]
    files = dict.fromkeys(f"tests/distributed/{feature.function.partition('::')[0]}.py" for feature in features)
    return [*PYTEST, "-p", "tests.gpu.sample", "--devices", kind, *files]


def _faults(kind: str, toy: bool) -> list[str]:
    return [*PYTEST, "--devices", kind, "tests/gpu/test_faults.py"]


PARTS = (
    Part("machine", 0.1, lambda kind, toy: _module("tests.gpu.machine")),
    Part("exchanges", 0.15, lambda kind, toy: _module("tests.gpu.smoke", "--devices", kind)),
    Part("one GPU", 0.3, _gpu_tests),
    Part("sample", 0.35, _sample),
    Part("faults", 0.3, _faults),
    Part("shares", 0.3, lambda kind, toy: _module("tests.gpu.shares", *(["--toy"] if toy else []))),
)


def run_part(part: Part, kind: str, toy: bool, most_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs one part and shows what it says.

    Returns:
        `outcome` (`passed`, `failed` or `out of time`), `seconds`, `devices` (their kind), `figures` (the last line
        that is a JSON object), and `tests` for a part of tests.
    """
    began = time.monotonic()
    print(f"== {part.name}, at most {most_s:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "tests.jsonl"
        process = subprocess.Popen(
            part.command(kind, toy),
            cwd=ROOT,
            env=environment | {record.VARIABLE: str(recorded)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that it ends with all processes that it has started
        )
        late = threading.Event()
        timer = threading.Timer(most_s, lambda: (late.set(), _end(process)))
        timer.start()
        figures: Any = None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if (said := _json_object(line)) is not None:
                    figures = said
                else:
                    print(f"{time.monotonic() - began:6.1f} s  {line.rstrip()}", flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            _end(process)
        tests = [json.loads(line) for line in recorded.read_text().splitlines()] if recorded.exists() else []
    outcome = "out of time" if late.is_set() else "passed" if code == 0 else "failed"
    seconds = round(time.monotonic() - began, 1)
    print(f"== {part.name}: {outcome} after {seconds} s", flush=True)
    result: dict[str, Any] = {"outcome": outcome, "seconds": seconds, "devices": kind}
    if figures is not None:
        result["figures"] = figures
    return result | ({"tests": summary(tests)} if tests else {})


def summary(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Of recorded tests: how many passed, what failed and was skipped and why, and what passed ones have printed."""
    passed = [test for test in tests if test["outcome"] == "passed"]
    skipped = Counter(test.get("why", "") for test in tests if test["outcome"] == "skipped")
    features = dict.fromkeys(test["feature"] for test in tests if "feature" in test)
    failed = {test["test"]: test.get("why", "") for test in tests if test["outcome"] in ("failed", "error")}
    return {
        "passed": len(passed),
        "failed": failed,
        "skipped": dict(skipped),
        "features": {
            name: "passed"
            if all(test["outcome"] == "passed" for test in tests if test.get("feature") == name)
            else ", ".join(sorted({test["outcome"] for test in tests if test.get("feature") == name}))
            for name in features
        },
        "printed": {test["test"]: test["printed"].strip() for test in passed if test["printed"].strip()},
    }


def _json_object(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment_for_parts(toy: bool) -> dict[str, str]:
    """Of this process, with what says that this is the toy."""
    return os.environ | ({"SEQUENCE_PARALLEL_GPU_TOY": "1", sample.VARIABLE: "toy"} if toy else {})


def kind_of_devices(toy: bool) -> str:
    """Ranks share the first GPU unless there are enough for the sample; what two GPUs show is in `tests/gpu`."""
    if toy:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.device_count() >= 4 else "shared"


def file_name(result: dict[str, Any]) -> str:
    gpus = result["hardware"]["gpus"]
    card = f"{len(gpus)}x {gpus[0]['name']}" if len(gpus) > 1 else gpus[0]["name"] if gpus else "no gpu"
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-{result['date']}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default 8)")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="this part; repeatable")
    parser.add_argument("--output", type=Path, help=f"folder of the JSON file (default {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--toy", action="store_true", help="what needs no GPU, on CPU ranks; no file without --output")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"this Python ({sys.executable}) lacks {', '.join(missing)}")
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; allowed is more than 0")
    if not options.toy:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here; --toy runs what needs none")

    kind, end = kind_of_devices(options.toy), time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {"minutes": options.minutes, "toy": options.toy, "parts": {}}
    environment = environment_for_parts(options.toy)
    for part in PARTS:
        if part.name != "machine" and options.only and part.name not in options.only:
            continue
        most_s = min(60 * options.minutes * part.share, end - time.monotonic())
        if most_s < 1:
            print(f"== {part.name}: no time left", flush=True)
            result["parts"][part.name] = {"outcome": "no time left"}
            continue
        found = run_part(part, kind, options.toy, most_s, environment)
        if part.name == "machine":
            result |= found.pop("figures", {"date": None, "hardware": {"gpus": []}, "versions": {}})
        result["parts"][part.name] = found
    if options.output or not options.toy:
        folder = options.output or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / file_name(result)
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(file)
    outcomes = {name: part["outcome"] for name, part in result["parts"].items()}
    print(", ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return 0 if set(outcomes.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
