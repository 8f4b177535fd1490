"""Folder that keeps compiled code between starts of the workers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's environment variable for the folder; a value set by the user is kept."""


def use_folder() -> Path:
    """Sets PyTorch's compile cache to a folder of this user, which is created if needed, and returns the folder.

    PyTorch executes the code that it finds there, so anyone with write access could have code run. The folder is
    therefore not under ComfyUI's folders, some of which accept files over HTTP, nor in a shared /tmp (PyTorch's
    default), and only this user may write to it.

    Raises:
        OSError: the folder cannot be created, or other users own it or can write to it.
    """
    given = Path(os.environ.get(VARIABLE, ""))
    default = given.parent == Path(tempfile.gettempdir()) and given.name.startswith("torchinductor_")
    if (
        given.name and not default
    ):  # PyTorch sets its default there itself, also in the host, whose variables we inherit
        return given
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sequence-parallel" / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}; set {VARIABLE} to a folder that only you can write to")
    os.environ[VARIABLE] = str(folder)
    return folder
