"""`python -m parallel bench attention|step`: compares all workers with a single one, interleaved in one run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..config import SequenceParallelConfig, resolve
from ..degrees import Degrees
from ..diffusers.folder import recipe
from ..diffusers.tiny import tiny_request, write_tiny
from ..errors import ConfigError
from ..host.group import WorkerGroup
from ..host.remote_model import RemoteModel
from ..measure import QuietRounds
from ..plan import AttentionPlan
from ..sampling.step_request import StepRequest
from ..wire.messages import Attention, Slow

Result = dict[str, Any]
_NETWORK = "HunyuanVideoTransformer3DModel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Parameters of a benchmark.

    Raises:
        ConfigError: a value is out of range.
    """

    devices: str = "auto"
    ulysses_degree: int = 0
    ring_degree: int = 0
    tokens: int = 8192
    """Number of tokens of the latent."""
    text: int = 64
    heads: int = 2
    head_dim: int = 128
    batch: int = 1
    pipeline: int = 1
    """Number of chunks of heads that overlap exchange and kernel; 1 is unpipelined."""
    layers: tuple[int, int] = (8, 8)
    """Number of dual- and single-stream blocks of `bench step`."""
    rounds: int = 15
    dtype: torch.dtype = torch.float32
    slow: tuple[int, ...] = ()
    """Factor that slows each rank down; if set, a plan of equal shares is measured beside that of `devices`."""

    def __post_init__(self) -> None:
        for knob in ("tokens", "heads", "head_dim", "batch", "pipeline", "rounds"):
            if getattr(self, knob) < 1:
                raise ConfigError(f"{knob} is {getattr(self, knob)}; allowed are 1 or more")
        if self.text < 0:
            raise ConfigError(f"text is {self.text}; allowed are 0 or more")

    def configs(self) -> list[SequenceParallelConfig]:
        """Returns the configurations to compare: one device, all devices and, with `slow`, all with equal shares.

        Raises:
            ConfigError: the degrees do not fit the devices, or `slow` does not.
        """
        config = partial(SequenceParallelConfig, ulysses_degree=self.ulysses_degree, ring_degree=self.ring_degree)
        layout = resolve(config(devices=self.devices))
        names = [device.name for device in layout.devices]
        configs = [SequenceParallelConfig(devices=names[0]), config(devices=self.devices)]
        if self.slow:
            if len(self.slow) != len(names) or min(self.slow) < 1:
                raise ConfigError(f"slow is {self.slow}; give a whole number of 1 or more for each of {self.devices}")
            configs.append(config(devices=",".join(names)))
        return configs


def bench_attention(work: Workload) -> tuple[Result, str]:
    """Times one joint attention: kernel and exchange, nothing else."""
    layouts = [resolve(config) for config in work.configs()]
    degrees = layouts[1].degrees.choose(conditions=1, heads=work.heads)[0]
    message = Attention(
        degrees=degrees,
        tokens=work.tokens + work.text,
        heads=work.heads,
        head_dim=work.head_dim,
        batch=work.batch,
        pipeline=work.pipeline,
        dtype=str(work.dtype).removeprefix("torch."),
    )
    groups = [WorkerGroup(layout, threads=1) for layout in layouts]
    try:
        _start(groups, work)
        runs: list[Callable[..., list[Result]]] = [
            partial(group.call, replace(message, degrees=d))
            for group, d in zip(groups, (Degrees(), degrees, degrees), strict=False)
        ]
        checked = groups[1].call(replace(message, check=True))
        rounds = _rounds(groups, runs, work.rounds)
    finally:
        for group in groups:
            group.stop()
    times = [median(max(rank["ms"] for rank in ranks) for ranks in runs) for runs in zip(*rounds, strict=True)]
    kernel = median(max(rank["kernel_ms"] for rank in ranks) for _, ranks, *_ in rounds)
    plan = AttentionPlan.of_sequence(work.tokens + work.text, work.heads, layouts[1].speeds, degrees.ring)
    result = _result(work, degrees, times) | {
        "collectives_per_attention": checked[0]["collectives"],
        "bytes_sent_per_attention": max(r["bytes_sent"] for r in checked),
        "bytes_predicted": max(
            plan.exchange_bytes(rank, work.batch, work.head_dim, work.dtype.itemsize) for rank in range(plan.world_size)
        ),
        "kernel_ms": round(kernel, 3),
        "speedup_without_exchange": round(times[0] / kernel, 3),
        "exposed_ms": round(times[1] - kernel, 3),
        "measured_exposed_ms": round(_longest([ranks for _, ranks, *_ in rounds], "exposed_s"), 3),
        "measured_copying_ms": round(_longest([ranks for _, ranks, *_ in rounds], "copying_s"), 3),
        "max_abs_err": max(r["max_abs_err"] for r in checked),
    }
    return result, _text(result)


def bench_step(work: Workload) -> tuple[Result, str]:
    """Times one step of a tiny HunyuanVideo through the host, as ComfyUI would request it.

    Raises:
        ConfigError: there is no text, which diffusers' HunyuanVideo requires.
    """
    if not work.text:
        raise ConfigError("text is 0; of step, 1 or more tokens are allowed")
    configs = work.configs()
    layouts = [resolve(config) for config in configs]
    groups = [WorkerGroup(layout, threads=1) for layout in layouts]
    dual, single_stream = work.layers
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-bench-") as folder:
        write_tiny(Path(folder), _NETWORK, heads=work.heads, num_layers=dual, num_single_layers=single_stream)
        try:
            _start(groups, work)
            recipes = [recipe(folder, config, work.dtype) for config in configs]
            models = [RemoteModel(each, group=group) for each, group in zip(recipes, groups, strict=True)]
            request = tiny_request(
                _NETWORK, frames=1, height=2, width=2 * work.tokens, text=work.text, batch=work.batch, dtype=work.dtype
            )
            outputs = []
            for model in models:
                model.weights.ensure_loaded()
                outputs.append(model.steps([request])[0])
                model.steps([request])  # without the checks of the first step
            ranks = models[1].last_step
            rounds = _rounds(groups, [partial(_step, model, request) for model in models], work.rounds)
        finally:
            for group in groups:
                group.stop()
    degrees = layouts[1].degrees.choose(conditions=1, heads=work.heads)[0]
    times = [_longest(runs, "seconds") for runs in zip(*rounds, strict=True)]
    attentions = dual + single_stream
    over_half = times[1] - times[0] / degrees.world_size
    result = _result(work, degrees, times) | {
        "collectives_per_attention": ranks[0]["collectives"] / attentions,
        "bytes_sent_per_attention": max(rank["bytes_sent"] for rank in ranks) / attentions,
        "exposed_ms": round(over_half, 3),
        "exposed_ms_per_layer": round(over_half / attentions, 3),
        "measured_exposed_ms": round(_longest([ranks for _, ranks, *_ in rounds], "exposed_s"), 3),
        "measured_copying_ms": round(_longest([ranks for _, ranks, *_ in rounds], "copying_s"), 3),
        "max_abs_err": (outputs[0] - outputs[1]).abs().max().item(),
    }
    return result, _text(result)


def _start(groups: list[WorkerGroup], work: Workload) -> None:
    for group in groups:
        group.start()
    if work.slow:
        for group in groups[1:]:
            group.call(Slow(times=list(work.slow)))


def _step(model: RemoteModel, request: StepRequest) -> list[Result]:
    """Runs a step and returns each rank's figures; the host's overhead is the same for any number of workers."""
    model.steps([request])
    return model.last_step


def _longest(runs: Sequence[list[Result]], figure: str) -> float:
    """Returns the slowest rank's `figure` of each round, as the median over the rounds, in milliseconds."""
    return 1000 * median(max(rank[figure] for rank in ranks) for ranks in runs)


def _rounds(groups: list[WorkerGroup], runs: list[Callable[..., Any]], count: int) -> list[list[Any]]:
    """Runs interleaved rounds after a warm-up; repeats those that other load disturbed."""
    quiet = QuietRounds([os.getpid(), *(pid for group in groups for pid in group.pids)])
    for run in runs:
        run()
    return [[result for result, _ in quiet.run(runs)] for _ in range(count)]


def _result(work: Workload, degrees: Degrees, times: list[float]) -> Result:
    """Returns the figures that both benchmarks have.

    Args:
        times: milliseconds of one device, of all devices and, with `slow`, of all with equal shares.
    """
    result: Result = {
        "mode": f"ulysses {degrees.ulysses} × ring {degrees.ring}",
        "tokens": work.tokens,
        "text": work.text,
        "heads": work.heads,
        "world": degrees.world_size,
        "ms_single": round(times[0], 3),
        "ms_parallel": round(times[1], 3),
        "speedup": round(times[0] / times[1], 3),
    }
    if work.slow:
        sum_of_speeds = sum(1 / times_slower for times_slower in work.slow)
        for name, ms in (("of_sum_of_speeds", times[1]), ("of_sum_of_speeds_equal_plan", times[2])):
            result[name] = round(times[0] / ms / sum_of_speeds, 3)
    return result


def _text(result: Result) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:{width}}  {value}" for name, value in result.items())
