"""HunyuanVideo at full size on one GPU: step times, kernels, and one rank's exact share of a larger group.

    python -m tests.benchmarks.gpu_hunyuan_video --output tests/benchmarks/results        (minutes on one large GPU)
    python -m tests.benchmarks.gpu_hunyuan_video --toy                                    (seconds, also on a CPU)

It is diffusers' class, under its split plan. Weights are random; times do not depend on them. A share runs with
PyTorch's "fake" process group: arithmetic, packing and launches of that rank, no link. Nothing here measures
communication.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from parallel.attention.kernels import select
from parallel.cache.blocks import FirstBlockCache, StepPasses
from parallel.cache.hooked import cached_blocks
from parallel.degrees import Degrees
from parallel.errors import EngineError
from parallel.plans.diffusers import CHAINS, PLANS
from parallel.quantise.settings import DYNAMIC, WEIGHT_ONLY
from parallel.split import Split
from parallel.split.blocks import planned_blocks
from parallel.worker.fp8_linear import support
from parallel.worker.fp8_weights import quantise
from parallel.worker.homes import Replicated, by_block
from parallel.worker.packed import weights_of
from tests.gpu.full_size import (
    HUNYUAN_VIDEO,
    default_device,
    default_dtype,
    inputs_of,
    network_of,
    random_on,
    settle,
    share,
    split,
)

VALID = 201
"""Of 256 text tokens; a worker that shares a sequence drops the others."""
SHARES = (2, 4, 8)
MODEL = replace(HUNYUAN_VIDEO, toy={**HUNYUAN_VIDEO.toy, "num_attention_heads": 8})


class Bench:
    """Times steps of one model on one device."""

    def __init__(self, toy: bool):
        self.device, self.repeats, self.toy = default_device(), 1 if toy else 3, toy
        self.network = network_of(MODEL, 1 if toy else MODEL.slices, self.device, toy=toy)
        self.inputs = inputs_of(MODEL, self.device, toy=toy)
        mask: Tensor = self.inputs["encoder_attention_mask"]
        mask[:, mask.shape[1] * VALID // 256 :] = 0
        self.scheme = ""
        """Of the layers in FP8, if any are."""

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of the repeats, after a warm-up."""
        times = []
        for _ in range(self.repeats + 1):
            settle(self.device)
            began = time.perf_counter()
            with torch.no_grad():
                run()
            settle(self.device)
            times.append(time.perf_counter() - began)
        return median(times[1:])

    def step(self) -> None:
        self.network(**self.inputs)

    def split_step(self) -> float:
        """On one rank, as a worker runs it."""
        with split(MODEL, self.network):
            return self.seconds(self.step)

    def share_step(self, world_size: int) -> float:
        """As rank 0 of so many runs it."""
        with share(self.device, world_size) as run, split(MODEL, self.network) as planned:
            return self.seconds(partial(run, planned, self.step))

    def cache_hit(self) -> float:
        """A step of which First Block Cache skips all blocks but the first, on one rank."""
        cache = FirstBlockCache(inf, self.device, most_in_a_row=0)

        def step(planned: Split) -> None:
            cache.begin_step(Degrees(), active=True)
            passes = StepPasses(cache, "step", (), lambda sums: None)
            with cached_blocks(self.network, PLANS[MODEL.network], CHAINS[MODEL.network], planned, passes):
                self.step()

        with split(MODEL, self.network) as planned:
            seconds = self.seconds(partial(step, planned))  # the warm-up fills the cache
        assert cache.tally.hits == 1
        return seconds

    def quantise(self) -> None:
        """Puts the blocks' linear layers into FP8, but for their modulation; there is no way back."""
        self.scheme = DYNAMIC[0] if not support(self.device)[DYNAMIC[0]] else WEIGHT_ONLY
        plan = list(PLANS[MODEL.network])
        fp8 = {"scheme": self.scheme, "skip": ()}
        weights, _ = quantise(self.network, plan, weights_of(self.network, {}), fp8, self.device)
        rest, blocks = by_block(weights, planned_blocks(self.network, plan))
        Replicated(rest, blocks, self.device, lambda done, total: None)


def measure(toy: bool) -> dict[str, Any]:
    """All figures, with what they were measured on."""
    bench = Bench(toy)
    rows = {"diffusers": bench.seconds(bench.step), "one rank": bench.split_step()}
    rows |= {f"share of rank 0 of {world_size}": bench.share_step(world_size) for world_size in SHARES}
    rows["one rank + cache hit"] = bench.cache_hit()
    kernels = kernel_rates(bench)
    bench.quantise()  # from here on the model stays in FP8
    rows |= {"one rank + FP8": bench.split_step(), "one rank + FP8 + cache hit": bench.cache_hit()}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "dtype": str(default_dtype(bench.device)),
        "fp8": bench.scheme,
        "latent": list(bench.inputs["hidden_states"].shape),
        "text": [bench.inputs["encoder_hidden_states"].shape[1], int(bench.inputs["encoder_attention_mask"].sum())],
        "seconds_per_step": rows,
        "tflops": kernels,
    }


def kernel_rates(bench: Bench) -> dict[str, float | str]:
    """What this device reaches on one large product, and each kernel on one attention of the model's shape, in
    TFLOP/s; or why there is no such kernel."""
    heads = bench.network.config.num_attention_heads
    hidden, random = heads * 128, random_on(bench.device, default_dtype(bench.device))
    rows, tokens = (64, 128) if bench.toy else (16384, 118_800 + VALID)
    a, b = random(rows, hidden), random(hidden, 4 * hidden)
    rates: dict[str, float | str] = {
        "product": 2 * rows * hidden * 4 * hidden / bench.seconds(lambda: a @ b) / 1e12,
    }
    q = random(1, heads, tokens, 128)
    for name in ("auto", "sdpa", "cudnn", "flash", "sage") if bench.device.type == "cuda" else ("auto", "sdpa"):
        try:
            kernel = select(name, bench.device)
            rates[f"attention, {name}"] = (
                4 * tokens**2 * hidden / bench.seconds(lambda kernel=kernel: kernel(q, q, q)) / 1e12
            )
        except (ImportError, EngineError, RuntimeError) as error:
            rates[f"attention, {name}"] = f"not available: {str(error).splitlines()[0]}"
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that the script runs")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    result = measure(options.toy)
    for name, value in result["seconds_per_step"].items():
        print(f"{name:40}{value:10.3f} s")
    for name, value in result["tflops"].items():
        print(f"{name:40}{value if isinstance(value, str) else f'{value:10.1f} TFLOP/s'}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        file = options.output / f"hunyuan_video_{result['hardware'].replace(' ', '_')}_{result['date']}.json"
        file.write_text(json.dumps(result, indent=2))
        print(file)


if __name__ == "__main__":
    main()
