"""Headers of checkpoints, checked before a library reads them.

The safetensors library refuses offsets that overlap, leave holes or reach outside the file, headers that are no JSON of
its format, and sizes that overflow. It accepts names given twice, headers of 100 MB (seconds, and 1 GB of memory), and
shapes of tensors without elements that PyTorch cannot make.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

LONGEST = 8 << 20
"""Maximum bytes of a header or of a JSON file. A checkpoint with 10,000 tensors has a header of about 1.3 MB."""
MOST_COMMAS = 300_000
"""Maximum number of commas in it; each can make an object in memory, and a tensor has five or six."""
_MOST_DIMS = 64
_MOST_ELEMENTS = 2**63 - 1
_LONGEST_REASON = 300


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, is too large, or has a name twice.
    """
    try:
        with opened(path) as file:
            return _parsed(file.read(LONGEST + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {_shortened(error)}") from error


def check_safetensors(path: Path) -> None:
    """Checks a safetensors file's header.

    Raises:
        ValueError: the file is missing, damaged or incomplete, or its header is too large.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes is announced, in a file of {size} bytes")
            if length > LONGEST:
                raise ValueError(f"the header has {length} bytes; the longest may have {LONGEST}")
            header = _parsed(file.read(length))
        with safe_open(path, framework="pt"):
            pass
        for name, entry in header.items():
            shape = entry["shape"] if name != "__metadata__" else []
            if len(shape) > _MOST_DIMS or prod(max(1, dim) for dim in shape) > _MOST_ELEMENTS:
                raise ValueError(f"tensor {name[:100]!r} has a shape of {len(shape)} dims that no tensor can have")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path.name}: {_shortened(error)}") from error


def opened(path: Path) -> BinaryIO:
    """Opens a regular file; follows links. A named pipe would block, a device may have no end.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    return path.open("rb")


def _parsed(text: bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError, RecursionError: the text is not JSON, or could take too much memory.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    if (commas := text.count(b",")) > MOST_COMMAS:
        raise ValueError(f"it lists {commas} items; {MOST_COMMAS} are the most")
    return json.loads(text.decode(), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:100]!r} is given twice")
    return found


def _shortened(error: Exception) -> str:
    """Returns the error's message, shortened: a name in it can be as long as the file."""
    text = str(getattr(error, "strerror", None) or error)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
