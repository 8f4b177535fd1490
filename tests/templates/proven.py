"""The templates that `test_proofs` runs."""

from __future__ import annotations

PROVEN: tuple[str, ...] = ()
