"""Whether a worker starts from the same files as its host. They differ when the pack is updated while ComfyUI runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ENGINE = Path(__file__).resolve().parent.parent


def digest() -> str:
    """Of all modules of the engine, as they are on disk now."""
    found = hashlib.sha256()
    for path in sorted(_ENGINE.rglob("*.py")):
        found.update(path.relative_to(_ENGINE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


AT_IMPORT = digest()
"""Of the files that this process runs, if it imports this module early."""
