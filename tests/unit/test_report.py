"""The report for a bug: what is in it, what is not, and that nothing missing or stuck keeps it from being made."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel import __version__, report
from parallel.host import group_log, status
from parallel.host.group_log import GroupLog
from parallel.report import compose, scrub


@pytest.fixture(autouse=True)
def _jane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a user `jane`, on a machine without nvidia-smi."""
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("USER", "jane")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(status, "_errors", status.deque(maxlen=10))


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str], None]:
    """Puts an nvidia-smi into the path, a shell script."""

    def put(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return put


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    group_log.keep_in(tmp_path / "logs")
    yield tmp_path / "logs"
    group_log.keep_in(None)


def made(*folders: Path, state: object = ()) -> str:
    return compose(front={"ComfyUI": "0.33.0"}, config={"devices": "auto"}, state=state, log_folders=folders)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_it_has_versions_config_state_and_errors():
    status.tell(status.CRASHED, "worker rank 1 was ended")
    text = made(state=[{"plan": {"ulysses": 2}}])
    assert f"- Sequence Parallel {__version__}, ComfyUI 0.33.0, Python 3." in text
    assert re.search(r"^- torch \d+\.\d+.*, safetensors \d.*", text, re.MULTILINE)
    assert '- config: {"devices": "auto"}' in text
    assert '"ulysses": 2' in text
    assert re.search(r"Last errors:\n```\n\d{4}-\d\d-\d\d \d\d:\d\d:\d\d crashed: worker rank 1 was ended\n```", text)


def test_it_has_the_driver_and_the_topology(install: Callable[[str], None]):
    install(r"""case "$*" in
        --query-gpu=*) echo '0, NVIDIA H100, 570.1, 81559 MiB'; echo '1, NVIDIA H100, 570.1, 81559 MiB';;
        "topo -m") printf '\033[4mGPU0 GPU1\033[0m\nX NV18\n';;
    esac""")
    text = made()
    assert "memory): 0, NVIDIA H100, 570.1, 81559 MiB; 1, NVIDIA H100, 570.1, 81559 MiB\n" in text
    assert "Topology (nvidia-smi topo -m):\n```\nGPU0 GPU1\nX NV18\n```" in text


def test_without_nvidia_smi_it_says_so():
    text = made()
    assert "nvidia-smi cannot be run (No such file or directory)" in text and "Topology" not in text


def test_an_nvidia_smi_that_fails_is_quoted(install: Callable[[str], None]):
    install("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    text = made()
    assert "nvidia-smi failed (18): Failed to initialize NVML: Driver/library version mismatch" in text
    assert "Topology" not in text


def test_an_nvidia_smi_that_hangs_is_left(install: Callable[[str], None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "_NVIDIA_SMI_S", 0.2)
    install("while :; do :; done")
    text = made()
    assert "nvidia-smi did not answer within 0.2 s" in text and "Topology" not in text


def test_it_ends_with_the_ends_of_the_newest_logs(logs: Path):
    for number in range(5):
        file = GroupLog([f"cuda:{number}"])
        file.write("\n".join(f"line {i}." for i in range(200)), rank=0)
        file.close()
        os.utime(logs / f"workers-cuda{number}.log", (number, number))
    text = made(logs, logs / "missing")
    assert re.findall(r"^End of (.*):$", text, re.MULTILINE) == [f"workers-cuda{n}.log" for n in (4, 3, 2)]
    assert "[rank 0] line 199.\n```" in text and "line 120." in text and "line 119." not in text


def test_a_log_that_was_just_begun_is_told_with_the_one_before(logs: Path):
    logs.mkdir()
    (logs / "workers-cpu.log.1").write_text("old\n")
    (logs / "workers-cpu.log").write_text("new\n")
    assert "End of workers-cpu.log:\n```\nold\nnew\n```" in made(logs)


def test_what_is_quoted_does_not_end_its_block(logs: Path):
    logs.mkdir()
    (logs / "workers-cpu.log").write_text("```\n" + "x" * 5000 + "\n")
    text = made(logs)
    assert text.count("```") % 2 == 0 and "'''" in text
    assert max(map(len, text.splitlines())) < 1000


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log: /home/jane/ComfyUI/user/workers.log", "log: ~/ComfyUI/user/workers.log"),
        ("in /home/jane", "in ~"),
        ("/home/janet/x and /mnt/c/Users/Joe/y", "/home/<user>/x and /mnt/c/Users/<user>/y"),
        ("/srv/jane/run.py of jane@host", "/srv/<user>/run.py of <user>@host"),
        ("janet, bluejane", "janet, bluejane"),
        ("'/mnt/My Models/wan 2.1.safetensors' is damaged", "'wan 2.1.safetensors' is damaged"),
        ("/home/jane/m/flux.gguf: not read", "flux.gguf: not read"),
        ("reading video/secret/a.ckpt now", "reading a.ckpt now"),
        ("and/or /m/a.safetensors, /m/b.sft", "and/or a.safetensors, b.sft"),
        ('File "/usr/lib/torch/x.py", line 3, in load', 'File "/usr/lib/torch/x.py", line 3, in load'),
    ],
)  # fmt: skip
def test_personal_paths_are_removed(text: str, expected: str):
    assert scrub(text) == expected


@pytest.mark.timeout(60)  # a pattern that looks at every end for every beginning takes hours
@pytest.mark.parametrize("text", ["a/" * 50_000, "/a b" * 50_000, "a" * 200_000])
def test_long_lines_take_no_longer_than_many_short_ones(text: str):
    assert scrub(text) == text


@pytest.mark.parametrize("name", ["root", "ubuntu"])
def test_names_that_everybody_has_stay(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("USER", name)
    monkeypatch.setenv("HOME", f"/{name}")
    assert scrub(f"{name} cause, /{name}/x, /srv/{name}") == f"{name} cause, ~/x, /srv/{name}"


def test_the_report_is_without_them_as_a_whole(logs: Path):
    status.tell(status.CRASHED, "worker rank 0 failed; log: /home/jane/logs/workers-cpu.log")
    logs.mkdir()
    (logs / "workers-cpu.log").write_text("[rank 0] /home/jane/models/wan.safetensors is damaged, jane\n")
    text = made(logs, state=[{"failure": "in /home/jane/x"}])
    assert "[rank 0] wan.safetensors is damaged, <user>" in text
    assert "log: ~/logs/workers-cpu.log" in text and '"failure": "in ~/x"' in text
    assert "jane" not in text and "/models/" not in text
