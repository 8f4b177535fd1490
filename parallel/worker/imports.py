"""What a worker does not import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_transformers() -> Iterator[None]:
    """To import diffusers in, for the first time.

    If transformers is there, diffusers imports it, for pipelines, LoRA loaders and quantised files of its own. No model
    here needs them, and they cost each worker more than a second of processor time at its start.
    """
    if "diffusers" in sys.modules or "transformers" in sys.modules:
        yield
        return
    sys.modules["transformers"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules["transformers"]
