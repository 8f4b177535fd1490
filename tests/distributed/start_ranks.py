"""Processes that run one module of tests as ranks of a world."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.devices import on_ranks, rank_environment

ROOT = Path(__file__).parents[2]


def run_ranks(
    module: str,
    world: int,
    folder: Path,
    arguments: Sequence[str] = (),
    timeout: float = 120,
    python: str = sys.executable,
) -> list[str]:
    """Runs `PYTHON -m MODULE RANK WORLD STORE RESULTS [ARGUMENTS]` for each rank; returns the contents of RESULTS."""
    on_ranks(",".join(["cpu"] * world))  # skips where there are too few devices
    files = [folder / f"{rank}.json" for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [python, "-m", module, str(rank), str(world), str(folder / "store"), str(file), *arguments],
            cwd=ROOT,
            env=os.environ | rank_environment(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    for number, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {number} ended with {process.returncode}:\n{output}"
    return [file.read_text() for file in files]
