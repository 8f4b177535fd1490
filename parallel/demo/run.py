"""The demo: a tiny random HunyuanVideo, sampled by all workers and by one, step by step in turn.

Random weights make a picture of noise; the demo shows that both give the same noise, and how long each takes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Layout, SequenceParallelConfig, resolve
from ..diffusers.folder import recipe
from ..diffusers.tiny import tiny_request, write_tiny
from ..errors import ConfigError
from ..host.group import WorkerGroup
from ..host.remote_model import RemoteModel
from ..measure import QuietRounds
from .picture import decode_in_tiles, write_animation

# 17 frames of 512 × 832 pixels: 8320 tokens, so that attention outweighs the rest, as it does in real videos.
_INPUTS: dict[str, Any] = {"frames": 5, "height": 64, "width": 104, "text": 32, "valid": (21,)}
_NETWORK = "HunyuanVideoTransformer3DModel"
_SHIFT = 7.0
"""HunyuanVideo's flow shift."""


def run_demo(*, devices: str, steps: int, output: str) -> tuple[dict[str, Any], str]:
    """Runs the demo.

    Args:
        devices: as in SP Config.
        steps: denoising steps that are timed; one more warms up.
        output: path of the animated file.

    Returns:
        The measured figures, and the same as a table.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}; allowed are 1 or more")
    layout = resolve(SequenceParallelConfig(devices=devices))
    alone = resolve(SequenceParallelConfig(devices=layout.devices[0].name))
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-demo-") as folder:
        path = Path(folder)
        print("writing a tiny random HunyuanVideo", file=sys.stderr)
        write_tiny(path, _NETWORK, num_layers=1, num_single_layers=1)
        print(f"starting 1 + {layout.world_size} workers on {layout.device_type}", file=sys.stderr)
        latents, seconds = _sample(path, alone, layout, steps)
    difference = (latents[0] - latents[1]).abs().max().item()
    print("decoding in tiles", file=sys.stderr)
    file = write_animation(decode_in_tiles(latents[1]), Path(output))

    single, parallel = (median(times) * steps for times in seconds)
    result = {
        "workers": layout.world_size,
        "device": layout.device_type,
        "threads_per_process": 1,
        "steps": steps,
        "wall_s_single": round(single, 3),
        "wall_s_parallel": round(parallel, 3),
        "speedup": round(single / parallel, 3),
        "max_abs_diff": difference,
        "output": str(file),
    }
    return result, _table(result)


def _sample(path: Path, alone: Layout, layout: Layout, steps: int) -> tuple[list[Tensor], list[list[float]]]:
    """Samples with one worker and with all; returns both latents and the seconds of each step: [alone, parallel].

    Each process uses one thread.
    """
    groups = [WorkerGroup(alone, threads=1), WorkerGroup(layout, threads=1)]
    try:
        models = []
        for group in groups:
            group.start()
            config = SequenceParallelConfig(devices=",".join(device.name for device in group.layout.devices))
            models.append(RemoteModel(recipe(str(path), config), group=group))
            models[-1].weights.ensure_loaded()
        request = tiny_request(_NETWORK, **_INPUTS)
        for model in models:  # warm-up: checks attention and sends the conditioning
            model.steps([request])
        times = torch.linspace(1, 0, steps + 1)
        sigmas = _SHIFT * times / (1 + (_SHIFT - 1) * times)
        latents = [request.x.clone(), request.x.clone()]
        seconds: list[list[float]] = [[], []]
        quiet = QuietRounds([os.getpid(), *(pid for group in groups for pid in group.pids)])
        for now, following in tqdm(pairwise(sigmas), total=steps, desc="sampling", unit="step"):
            at = [replace(request, x=x, timestep=1000 * now[None]) for x in latents]
            runs = [partial(model.steps, [step]) for model, step in zip(models, at, strict=True)]
            for i, ((velocity,), taken) in enumerate(quiet.run(runs)):
                seconds[i].append(taken)
                latents[i] = latents[i] + (following - now) * velocity
        return latents, seconds
    finally:
        for group in groups:
            group.stop()


def _table(result: dict[str, Any]) -> str:
    rows = [
        ("", "1 worker", f"{result['workers']} workers"),
        (f"seconds for {result['steps']} steps", f"{result['wall_s_single']:.2f}", f"{result['wall_s_parallel']:.2f}"),
        ("speed-up", "1.00", f"{result['speedup']:.2f}"),
        ("max |difference|", "", f"{result['max_abs_diff']:.1e}"),
    ]
    lines = [f"{name:24} {one:>12} {many:>12}" for name, one, many in rows]
    lines.append(f"{result['device']}, one thread per process, median step × steps; clip: {result['output']}")
    return "\n".join(lines)
