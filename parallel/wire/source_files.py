"""Detects workers started from other source files than their host: the pack may be updated while ComfyUI runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ENGINE = Path(__file__).resolve().parent.parent


def digest() -> str:
    """Returns a SHA-256 digest of all modules of the engine as they are on disk now."""
    found = hashlib.sha256()
    for path in sorted(_ENGINE.rglob("*.py")):
        found.update(path.relative_to(_ENGINE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


AT_IMPORT = digest()
"""Digest of the files that this process runs, provided that it imported this module early."""
