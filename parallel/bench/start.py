"""`python -m parallel bench start`: times the start of the workers and the load of a first model, phase by phase."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..config import Layout, SequenceParallelConfig, resolve
from ..diffusers.folder import recipe
from ..diffusers.tiny import tiny_request, write_tiny
from ..errors import ConfigError
from ..host.group import WorkerGroup
from ..host.recipe import Recipe
from ..host.remote_model import RemoteModel

_NETWORK = "HunyuanVideoTransformer3DModel"
_WAYS = ("overlapped", "in_turn")
"""Libraries imported during the rendezvous of the ranks, as for ComfyUI; or imported by the first load."""


def bench_start(devices: str, rounds: int) -> tuple[dict[str, Any], str]:
    """Starts workers, loads a tiny HunyuanVideo and runs one step, in each of `_WAYS` in turn.

    Args:
        devices: as in SP Config.
        rounds: number of starts in each way.

    Returns:
        `world`, `device`, `rounds`, `torch`, and for each of `overlapped` and `in_turn` medians in seconds: `total` of
        wall time, `start` and `load` by phase (`GroupFigures`). The same as text.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; allowed are 1 or more")
    config = SequenceParallelConfig(devices=devices)
    layout = resolve(config)
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-bench-") as folder:
        write_tiny(Path(folder), _NETWORK, num_layers=1, num_single_layers=1)
        run = partial(_first_step, recipe(folder, config), layout)
        runs = [{way: run(ahead=way == "overlapped") for way in _WAYS} for _ in range(rounds)]
    result: dict[str, Any] = {
        "world": layout.world_size,
        "device": layout.device_type,
        "rounds": rounds,
        "torch": torch.__version__,
    }
    for way in _WAYS:
        of_way = [each[way] for each in runs]
        result[way] = {
            "total": round(median(each["total"] for each in of_way), 3),
            **{part: _medians([each[part] for each in of_way]) for part in ("start", "load")},
        }
    return result, _text(result)


def _first_step(recipe: Recipe, layout: Layout, *, ahead: bool) -> dict[str, Any]:
    """Times the start of a group, the load of the model and its first prediction."""
    request = tiny_request(recipe.network)
    began = time.perf_counter()
    group = WorkerGroup(layout, threads=1, first=recipe.to_json() if ahead else None)
    try:
        group.start()
        model = RemoteModel(recipe, group)
        model.weights.ensure_loaded()
        model.steps([request])
        total = time.perf_counter() - began
        return {"total": total, "start": dict(group.figures.start), "load": dict(group.figures.load)}
    finally:
        group.stop()


def _medians(phases: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(each[name] for each in phases), 3) for name in phases[0]}


def _text(result: dict[str, Any]) -> str:
    phases = [(part, name) for part in ("start", "load") for name in result["overlapped"][part]]
    rows = [("seconds, median", *(way.replace("_", " ") for way in _WAYS))]
    rows += [(f"{part}: {name}", *(f"{result[way][part][name]:.2f}" for way in _WAYS)) for part, name in phases]
    rows += [("until the first step", *(f"{result[way]['total']:.2f}" for way in _WAYS))]
    lines = [f"{name:24} {first:>12} {second:>12}" for name, first, second in rows]
    lines.append(f"{result['world']} workers on {result['device']}, one thread each, {result['rounds']} rounds")
    return "\n".join(lines)
