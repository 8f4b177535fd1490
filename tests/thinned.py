"""Which cases of a large table are in the plain run; the others are extended (`-m extended`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def thinned(rows: Sequence[Any], columns: Sequence[Any], keep: int) -> list[Any]:
    """Every pair of a row and a column, of which one in `keep` is plain: each row meets some columns, and each column
    some rows. Columns may be tuples of values."""
    return [
        pytest.param(
            row,
            *(column if isinstance(column, tuple) else (column,)),
            marks=() if (i + j) % keep == 0 else pytest.mark.extended,
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def one_in(keep: int, cases: Sequence[Sequence[Any]]) -> list[Any]:
    """All cases, of which one in `keep` is plain."""
    return [pytest.param(*case, marks=() if i % keep == 0 else pytest.mark.extended) for i, case in enumerate(cases)]
