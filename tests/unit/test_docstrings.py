"""Docstrings of the pack open with a verb or a noun phrase."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "__init__.py", *(ROOT / "parallel").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")])
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
NO_OPENING = {"As", "By", "How", "Of", "What", "Whether", "Which"}


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, those below constants and attributes included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for before, after in pairwise([None, *body] if isinstance(body, list) else []):
            documented = isinstance(before, ast.Assign | ast.AnnAssign)
            documented |= before is None and isinstance(node, _DOCUMENTED)
            if documented and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                yield after.lineno, str(after.value.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    found = [f"{path.name}:{line}: {text}" for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))]
    wrong = [text for text in found if text.split(": ", 1)[1].split(maxsplit=1)[0].rstrip(",") in NO_OPENING]
    assert not wrong, "\n".join(wrong)
