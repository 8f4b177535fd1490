"""The doctor where something is missing or broken: a line for each check, exit status 1, and no traceback."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel import __main__ as front_door
from parallel.versions import OLDEST_PYTHON, OLDEST_TORCH

ROOT = Path(__file__).parents[2]
CUDA = """
__version__ = "2.13.0+cu130"
class version:
    cuda = "13.0"
class cuda:
    @staticmethod
    def is_available():
        {is_available}
    @staticmethod
    def device_count():
        raise RuntimeError("CUDA error: unknown error")
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m parallel` without site-packages, and with a `torch` of this source, if one is given."""

    def run(*arguments: str, torch: str | None = None, metadata: str = "") -> subprocess.CompletedProcess[str]:
        packages = tmp_path / "packages"
        for name, version in (("torch", metadata), ("safetensors", "0.5.0")):
            if version:
                (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
                text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
        if torch is not None:
            (packages / "torch").mkdir(parents=True)
            (packages / "torch" / "__init__.py").write_text(torch)
        environment = os.environ | {
            "PYTHONPATH": str(packages),
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "PATH": str(tmp_path / "no-nvidia-smi"),
        }
        command = [sys.executable, "-S", "-m", "parallel", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


BROKEN = {
    "missing": (None, "", "libraries", r"torch is not installed in this Python \(.*\); use the one that runs ComfyUI"),
    "too old": ("", "2.4.1", "libraries", rf"torch is 2\.4\.1; Sequence Parallel needs {OLDEST_TORCH} or newer"),
    "older than its metadata": ("__version__ = '2.4.1'", "2.13.0", "torch", r"torch is 2\.4\.1; Sequence Parallel"),
    "older, without metadata": ("__version__ = '2.4.1'", "", "torch", r"torch is 2\.4\.1; Sequence Parallel needs"),
    "removed in part": ("", "2.13.0", "torch", r"torch is without a version; Sequence Parallel needs"),
    "without libcudart": (
        "raise OSError('libcudart.so.13: cannot open shared object file')",
        "2.13.0",
        "torch",
        r"torch cannot be imported: OSError: libcudart\.so\.13: cannot open shared object file; reinstall it",
    ),
    "damaged": (
        "raise ImportError('libtorch.so: undefined symbol: x\\n\\nlines of advice')",
        "2.13.0",
        "torch",
        r"torch cannot be imported: ImportError: libtorch\.so: undefined symbol: x lines of advice; reinstall it",
    ),
    "without typing_extensions": (
        "import no_such_module",
        "2.13.0",
        "torch",
        r"torch cannot be imported: ModuleNotFoundError: No module named 'no_such_module'; reinstall it",
    ),
    "CUDA raises": (
        CUDA.format(is_available="raise RuntimeError('driver initialization failed')"),
        "2.13.0+cu130",
        "system",
        r"torch cannot use the GPUs.*: RuntimeError: driver initialization failed",
    ),
    "the count of GPUs raises": (
        CUDA.format(is_available="return True"),
        "2.13.0+cu130",
        "system",
        r"torch cannot use the GPUs.*: RuntimeError: CUDA error: unknown error",
    ),
    "a driver that is too old": (
        CUDA.format(is_available="import warnings; warnings.warn('CUDA initialization: too old'); return False"),
        "2.13.0+cu130",
        "system",
        r"torch cannot use the GPUs.*: CUDA initialization: too old",
    ),
}


@pytest.mark.parametrize(("torch", "metadata", "check", "message"), BROKEN.values(), ids=BROKEN)
def test_a_missing_or_broken_torch_is_a_line(
    run: Callable[..., subprocess.CompletedProcess[str]], torch: str | None, metadata: str, check: str, message: str
):
    result = run("doctor", "--json", torch=torch, metadata=metadata)
    assert (result.returncode, result.stderr) == (1, "")
    *lines, last = result.stdout.splitlines()
    assert re.match(rf"FAIL {check}: {message}", lines[-1]), result.stdout
    assert all(line.startswith("ok   ") for line in lines[:-1]), result.stdout
    found = json.loads(last)
    assert not found["ok"] and found["plan"] is None
    assert lines[-1] == f"FAIL {check}: {found['reason']}"


def test_other_warnings_of_torch_are_no_finding(run: Callable[..., subprocess.CompletedProcess[str]]):
    torch = CUDA.format(is_available="import warnings; warnings.warn('pynvml is deprecated'); return False")
    result = run("doctor", torch=torch, metadata="2.13.0")
    assert re.search(r"^ok   system: .*GPUs: none$", result.stdout, re.MULTILINE), result.stdout


def test_cpu_devices_need_no_driver(run: Callable[..., subprocess.CompletedProcess[str]]):
    torch = CUDA.format(is_available="import warnings; warnings.warn('CUDA initialization: too old'); return False")
    result = run("doctor", "--devices", "cpu,cpu", torch=torch, metadata="2.13.0")
    assert re.search(r"^ok   system: .*GPUs: none$", result.stdout, re.MULTILINE), result.stdout


def test_the_report_is_made_without_torch(run: Callable[..., subprocess.CompletedProcess[str]]):
    result = run("doctor", "--report", "--json")
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout.splitlines()[-1])["report"]
    assert result.stdout.startswith(report) and report.startswith("### Sequence Parallel report\n")
    assert "torch not installed" in report and '"detail": "torch is not installed in this Python' in report


def test_in_a_comfyui_the_report_has_the_log_of_its_workers(tmp_path: Path):
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "a-pack"
    shutil.copytree(ROOT / "parallel", pack / "parallel", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", pack)
    (tmp_path / "ComfyUI" / "folder_paths.py").touch()
    logs = tmp_path / "ComfyUI" / "user" / "__sequence_parallel"
    logs.mkdir(parents=True)
    (logs / "workers-cuda0-cuda1.log").write_text("[rank 1] the cause\n")
    command = [sys.executable, "-S", "-m", "parallel", "doctor", "--report"]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    result = subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, check=False)
    assert "End of workers-cuda0-cuda1.log:\n```\n[rank 1] the cause\n```" in result.stdout, result.stderr


@pytest.mark.parametrize("command", [["bench", "attention"], ["demo"], ["families"], ["plan", "Flux"]], ids=" ".join)
def test_other_commands_say_it_in_one_line(run: Callable[..., subprocess.CompletedProcess[str]], command: list[str]):
    result = run(*command, "--json") if command[0] in ("bench", "demo") else run(*command)
    assert result.returncode == 1
    assert re.fullmatch(r"error: torch is not installed in this Python .*\n", result.stderr)


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    assert front_door.main(["doctor", "--json"]) == 1
    told = capsys.readouterr()
    assert told.err == f"error: Python is 3.9.18; Sequence Parallel needs {OLDEST_PYTHON} or newer\n"
    assert json.loads(told.out)["ok"] is False
    assert f'requires-python = ">={OLDEST_PYTHON}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "name", ["__init__", "__main__", "doctor", "errors", "versions", "host/__init__", "host/group_log"]
)
def test_an_old_python_can_read_what_says_so(name: str):
    ast.parse((ROOT / "parallel" / f"{name}.py").read_text(), feature_version=(3, 8))
