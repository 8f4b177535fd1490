"""`python -m parallel bench attention|step`: all workers against one, in turn, in one run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..config import SequenceParallelConfig, resolve
from ..degrees import Degrees
from ..demo.checkpoint import write_tiny_hunyuan_video
from ..errors import ConfigError
from ..host.group import WorkerGroup
from ..host.recipe import Recipe
from ..host.remote_model import RemoteModel, StepRequest
from ..measure import QuietRounds
from ..plan import SequencePlan

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured.

    Raises:
        ConfigError: a figure is out of range.
    """

    devices: str = "auto"
    ulysses_degree: int = 0
    ring_degree: int = 0
    tokens: int = 8192
    """Of the latent."""
    text: int = 64
    heads: int = 2
    head_dim: int = 128
    batch: int = 1
    pipeline: int = 1
    """Chunks of heads that overlap exchange and kernel; 1 is unpipelined."""
    layers: tuple[int, int] = (8, 8)
    """Dual- and single-stream blocks of `bench step`."""
    rounds: int = 5
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for knob in ("tokens", "heads", "head_dim", "batch", "pipeline", "rounds"):
            if getattr(self, knob) < 1:
                raise ConfigError(f"{knob} is {getattr(self, knob)}; allowed are 1 or more")
        if self.text < 0:
            raise ConfigError(f"text is {self.text}; allowed are 0 or more")

    def config(self) -> SequenceParallelConfig:
        """On a machine without a GPU, `auto` is two CPU workers here."""
        auto = self.devices == "auto" and not torch.cuda.is_available()
        return SequenceParallelConfig(
            devices="cpu,cpu" if auto else self.devices,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
        )


def bench_attention(work: Workload) -> tuple[Result, str]:
    """One joint attention: kernel and exchange, nothing else."""
    config = work.config()
    layout = resolve(config)
    degrees = layout.degrees.choose(conditions=1, heads=work.heads)[0]
    alone = resolve(SequenceParallelConfig(devices=layout.devices[0].name))
    message = {
        "streams": [work.tokens, work.text],
        "heads": work.heads,
        "head_dim": work.head_dim,
        "batch": work.batch,
        "pipeline": work.pipeline,
        "dtype": str(work.dtype).removeprefix("torch."),
    }
    groups = [WorkerGroup(alone, threads=1), WorkerGroup(layout, threads=1)]
    try:
        for group in groups:
            group.start()
        runs: list[Callable[..., list[Result]]] = [
            partial(group.call, "attention", {**message, "degrees": asdict(d)})
            for group, d in zip(groups, (Degrees(), degrees), strict=True)
        ]
        checked = groups[1].call("attention", {**message, "degrees": asdict(degrees), "check": True})
        rounds = _rounds(groups, runs, work.rounds)
    finally:
        for group in groups:
            group.stop()
    single = median(max(r["ms"] for r in one) for one, _ in rounds)
    parallel = median(max(r["ms"] for r in many) for _, many in rounds)
    kernel = median(max(r["kernel_ms"] for r in many) for _, many in rounds)
    plan = SequencePlan((work.tokens, work.text), work.heads, layout.speeds, degrees.ring)
    result = _result(work, degrees, single, parallel) | {
        "collectives_per_attention": checked[0]["collectives"],
        "bytes_sent_per_attention": max(r["bytes_sent"] for r in checked),
        "bytes_predicted": max(
            plan.exchange_bytes(rank, work.batch, work.head_dim, work.dtype.itemsize) for rank in range(plan.world_size)
        ),
        "exposed_ms": round(parallel - kernel, 3),
        "max_abs_err": max(r["max_abs_err"] for r in checked),
    }
    return result, _text(result)


def bench_step(work: Workload) -> tuple[Result, str]:
    """One step of a tiny HunyuanVideo through the host, as ComfyUI would ask for it."""
    config = work.config()
    layout = resolve(config)
    alone = SequenceParallelConfig(devices=layout.devices[0].name)
    groups = [WorkerGroup(resolve(alone), threads=1), WorkerGroup(layout, threads=1)]
    dual, single_stream = work.layers
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-bench-") as folder:
        path = Path(folder) / "tiny.safetensors"
        write_tiny_hunyuan_video(path, heads=work.heads, depth=dual, depth_single=single_stream)
        try:
            for group in groups:
                group.start()
            recipe = partial(Recipe, path=str(path), weight_dtype=work.dtype, compute_dtype=work.dtype)
            models = [RemoteModel(recipe(config=c), group=g) for c, g in zip((alone, config), groups, strict=True)]
            request = _request(work)
            outputs = []
            for model in models:
                model.ensure_loaded()
                outputs.append(model.steps([request])[0])
            ranks = models[1].last_step
            rounds = _rounds(groups, [partial(_seconds, model, request) for model in models], work.rounds)
        finally:
            for group in groups:
                group.stop()
    degrees = layout.degrees.choose(conditions=1, heads=work.heads)[0]
    single, parallel = (median(one) * 1000 for one in zip(*rounds, strict=True))
    attentions = dual + single_stream
    over_half = parallel - single / layout.world_size
    result = _result(work, degrees, single, parallel) | {
        "collectives_per_attention": ranks[0]["collectives"] / attentions,
        "bytes_sent_per_attention": max(rank["bytes_sent"] for rank in ranks) / attentions,
        "exposed_ms": round(over_half, 3),
        "exposed_ms_per_layer": round(over_half / attentions, 3),
        "max_abs_err": (outputs[0] - outputs[1]).abs().max().item(),
    }
    return result, _text(result)


def _request(work: Workload) -> StepRequest:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(work.dtype)

    context = {"context": random(work.batch, work.text, 64), "y": random(work.batch, 768)}
    x = random(work.batch, 16, 1, 2, 2 * work.tokens)
    return StepRequest(x, torch.full((work.batch,), 500.0), {**context, "guidance": torch.tensor([6.0])})


def _seconds(model: RemoteModel, request: StepRequest) -> float:
    """The slowest rank's time; what the host adds is the same for any number of workers."""
    model.steps([request])
    return max(rank["seconds"] for rank in model.last_step)


def _rounds(groups: list[WorkerGroup], runs: list[Callable[..., Any]], count: int) -> list[list[Any]]:
    """Interleaved rounds after a warm-up; those that other load disturbed are repeated."""
    quiet = QuietRounds([os.getpid(), *(pid for group in groups for pid in group.pids)])
    for run in runs:
        run()
    return [[result for result, _ in quiet.run(runs)] for _ in range(count)]


def _result(work: Workload, degrees: Degrees, single: float, parallel: float) -> Result:
    return {
        "mode": f"ulysses {degrees.ulysses} × ring {degrees.ring}",
        "tokens": work.tokens,
        "text": work.text,
        "heads": work.heads,
        "world": degrees.world_size,
        "ms_single": round(single, 3),
        "ms_parallel": round(parallel, 3),
        "speedup": round(single / parallel, 3),
    }


def _text(result: Result) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:{width}}  {value}" for name, value in result.items())
