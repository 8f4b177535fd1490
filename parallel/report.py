"""Report for a bug: versions, driver, configuration, state, last errors, GPU topology, and the ends of the log files.

The panel (`nodes/report.py`) and `python -m parallel doctor --report` share it. It does not import torch, so that it
can report a broken one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import __version__
from .host import status

_PACKAGES = (
    "torch", "safetensors", "triton", "sageattention", "comfyui-frontend-package", "gguf", "diffusers", "transformers",
    "huggingface_hub", "peft", "accelerate", "torchao", "bitsandbytes",
)  # fmt: skip
_NVIDIA_SMI_S = 5.0
"""Timeout of nvidia-smi in seconds: it hangs if the driver does."""
_LOG_FILES = 3
_LOG_LINES = 80
_LOG_LINE = 400
"""Maximum characters of a log line; longer lines are cut."""


def compose(
    *, front: Mapping[str, str], config: object, state: object, log_folders: Sequence[Path], title: str = "Workers"
) -> str:
    """Returns the report as Markdown, without personal paths (`scrub`).

    Args:
        front: name → version of the program that started the engine, e.g. ComfyUI.
        config: the settings, as JSON data.
        state: state of the workers, or results of checks, as JSON data.
        log_folders: folders that may contain groups' log files.
        title: heading of `state`.
    """
    smi = _nvidia_smi("--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader")
    errors = [f"{_time(event.time)} {event.kind}: {event.text}" for event in status.errors()]
    lines = [
        "### Sequence Parallel report",
        "",
        f"- {_listed({'Sequence Parallel': __version__, **front, 'Python': platform.python_version()})}",
        f"- {_listed({name: _version(name) for name in _PACKAGES})}",
        f"- {platform.platform()}, {os.cpu_count()} cores",
        f"- torch sees: {_seen_by_torch()}",
        f"- nvidia-smi (index, name, driver, memory): {'; '.join(smi.splitlines())}",
        f"- config: {json.dumps(config, ensure_ascii=False)}",
        *_block(title, json.dumps(state, indent=1, ensure_ascii=False), "json"),
        *_block("Last errors", "\n".join(errors or ["none"])),
    ]
    if not smi.startswith("nvidia-smi"):
        lines += _block("Topology (nvidia-smi topo -m)", _nvidia_smi("topo", "-m"))
    for path in _newest_logs(log_folders):
        lines += _block(f"End of {path.name}", "\n".join(_tail(path)))
    return scrub("\n".join(lines))


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _block(title: str, text: str, language: str = "") -> list[str]:
    return ["", f"{title}:", f"```{language}", text.replace("```", "'''"), "```"]


def _seen_by_torch() -> str:
    """Returns the CUDA version and the GPUs of the torch that this process has loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "not loaded"
    try:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"CUDA {torch.version.cuda or 'none'}, GPUs: {', '.join(names) or 'none'}"
    except Exception as error:  # e.g. from a broken driver, which is what the report is for
        return f"{type(error).__name__}: {error}"


def _nvidia_smi(*arguments: str) -> str:
    """Returns nvidia-smi's output, or the reason why there is none, which begins with "nvidia-smi"."""
    try:
        process = subprocess.Popen(  # noqa: S603 (fixed arguments, no shell)
            ["nvidia-smi", *arguments],  # noqa: S607 (drivers install it in different folders of the path)
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return f"nvidia-smi cannot be run ({error.strerror})"
    try:
        output, _ = process.communicate(timeout=_NVIDIA_SMI_S)
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting for it: inside a stuck driver it does not end
        assert process.stdout is not None
        process.stdout.close()
        return f"nvidia-smi did not answer within {_NVIDIA_SMI_S:g} s"
    output = re.sub(r"\x1b\[[\d;]*m", "", output).strip()
    return output if process.returncode == 0 else f"nvidia-smi failed ({process.returncode}): {output}"


# --- log files --------------------------------------------------------------------------------------------------------


def _newest_logs(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, float] = {}
    for folder in folders:
        for path in folder.glob("workers-*.log"):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_mtime
    return sorted(found, key=lambda path: -found[path])[:_LOG_FILES]


def _tail(path: Path) -> list[str]:
    """Returns the last lines; if the file is short, also lines of the rotated file before it."""
    lines: list[str] = []
    for each in (path.with_name(f"{path.name}.1"), path):
        with contextlib.suppress(OSError), each.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_LINES * _LOG_LINE))
            lines += file.read().decode(errors="replace").splitlines()
    return [line[:_LOG_LINE] for line in lines[-_LOG_LINES:]]


# --- personal paths ---------------------------------------------------------------------------------------------------

_PART = r"""[^\s/'"](?:[^\n/'"]{0,250}[^\s/'"])?"""
"""Pattern of a folder or file in a path, which may have spaces inside. The limits keep long lines from taking long."""
_ABSOLUTE = rf"(?<![\w.])~?/(?:{_PART}/){{0,40}}"
_RELATIVE = r"""(?:[^\s/'":;,()=\[\]]{1,250}/){1,40}"""
_MODEL_FOLDERS = re.compile(rf"(?:{_ABSOLUTE}|{_RELATIVE})(?={_PART}\.(?:safetensors|sft|gguf|ckpt|pth|pt|bin)\b)")
_ANY_HOME = re.compile(r"/(home|Users)/[^/\s'\":;,]+")
_NOT_PERSONAL = {"root", "user", "admin", "ubuntu", "comfy", "comfyui"}


def scrub(text: str) -> str:
    """Removes text that identifies the user or the machine: home directories become `~`, names of the user and the
    machine become `<user>`, and model files lose their folders."""
    for home in sorted(set(_homes()), key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    text = _MODEL_FOLDERS.sub("", _ANY_HOME.sub(r"/\1/<user>", text))
    for name in set(_names()) - _NOT_PERSONAL:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "<user>", text)
    return text


def _homes() -> Iterator[str]:
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):  # a container's user need not be in the user database
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    for home in homes:
        for path in (home, os.path.realpath(home)):
            if home and len(path) > 1:
                yield path.rstrip("/")


def _names() -> Iterator[str]:
    yield from filter(None, (os.environ.get(name) for name in ("USER", "LOGNAME", "SUDO_USER")))
    yield from filter(None, [platform.node()])  # NCCL writes it to the log
    with contextlib.suppress(KeyError):
        yield pwd.getpwuid(os.getuid()).pw_name
