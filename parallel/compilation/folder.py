"""Where compiled code is kept between starts of the workers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's own; a user who sets it has chosen the folder."""


def use_folder() -> Path:
    """Tells PyTorch's compiler to keep its code in a folder of this user, which is made if need be.

    Whoever can write there can have code run: PyTorch executes what it finds. So it is not under ComfyUI's folders,
    some of which take files over HTTP, nor in a /tmp that others share (PyTorch's default), and no one else may write
    to it.

    Raises:
        OSError: there is no such folder and none can be made, or it is not this user's alone.
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
