"""README's figures of GPUs, from the files that `make gpu` has written: `python -m tests.gpu.table [--check]`.

Writes the lines between two marks of README.md; with `--check` it only compares, and fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.run import RESULTS, ROOT
from tests.gpu.shares import WORLDS

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NOTHING = "No run of `make gpu` is recorded yet, so there are no figures of GPUs."


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The recorded runs, oldest first."""
    runs = [json.loads(path.read_text()) for path in folder.glob("gpu-*.json")]
    return sorted((run for run in runs if not run["toy"]), key=lambda run: (run["date"], _card(run)))


def as_markdown(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return NOTHING
    lines = ["| GPU | date | torch, CUDA, NCCL, driver | what ran |", "|---|---|---|---|"]
    for run in runs:
        versions = ", ".join(str(run["versions"].get(name)) for name in ("torch", "cuda", "nccl", "driver"))
        lines.append(f"| {_card(run)} | {run['date']} | {versions} | {'; '.join(map(_part, run['parts'].items()))} |")
    shares = [(run, run["parts"].get("shares", {}).get("figures") or {}) for run in runs]
    if any(figures for _, figures in shares):
        lines += [
            "",
            "One rank's share of a step without what a link would take, ms (peak memory with two slices of the blocks)."
            " HunyuanVideo on one rank computes with diffusers' mask, in slower kernels; shares drop it, so compare"
            " these with each other:",
        ]
        lines += ["", f"| model | GPU | {' | '.join(f'1 of {world}' for world in WORLDS)} |"]
        lines += [f"|---|---|{'---|' * len(WORLDS)}"]
    for run, figures in shares:
        for model, worlds in figures.items():
            cells = " | ".join(_share(worlds.get(str(world))) for world in WORLDS)
            lines.append(f"| {model} | {_card(run)} | {cells} |")
    return "\n".join(lines)


def _card(run: dict[str, Any]) -> str:
    names = [gpu["name"] for gpu in run["hardware"]["gpus"]]
    return " and ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _part(item: tuple[str, dict[str, Any]]) -> str:
    name, part = item
    tests = part.get("tests")
    counts = f", {tests['passed']} tests passed, {len(tests['failed'])} failed" if tests else ""
    return f"{name}: {part['outcome']}{counts}"


def _share(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "failed" in figures:
        return str(figures["failed"])
    return f"{figures['ms_per_step']:.0f} ({figures['peak_gib']:.1f} GiB)"


def put(text: str, table: str) -> str:
    """README with this table."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md lacks {BEGIN} or {END}"
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = put(text, as_markdown(read()))
    if wanted == text:
        return 0
    if options.check:
        print("README.md does not show what tests/gpu/results has: run python -m tests.gpu.table", file=sys.stderr)
        return 1
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
