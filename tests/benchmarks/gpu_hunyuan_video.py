"""HunyuanVideo at full size on one GPU: step times, kernels, and one rank's exact share of a larger group.

    python -m tests.benchmarks.gpu_hunyuan_video --output tests/benchmarks/results        (minutes on one large GPU)
    python -m tests.benchmarks.gpu_hunyuan_video --toy                                    (seconds, also on a CPU)

Weights are random; times do not depend on them. A share runs with PyTorch's "fake" process group: arithmetic, packing
and launches of that rank, no link. Nothing here measures communication.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.adapters.base import StepContext
from parallel.adapters.hunyuan_video import HunyuanVideoAdapter
from parallel.attention.kernels import select
from parallel.cache.blocks import FirstBlockCache, StepPasses
from parallel.compilation.blocks import CompiledBlocks
from parallel.compilation.settings import CompileSettings
from parallel.degrees import Degrees
from parallel.errors import EngineError
from parallel.quantise.settings import DYNAMIC, WEIGHT_ONLY
from parallel.wire.control import ControlPage
from parallel.worker.fp8_linear import fp8_layer, support
from parallel.worker.ranks import ParallelContext, Ranks, SoloContext

FULL = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
FULL_LATENT = (1, 16, 33, 90, 160)  # 720p, 129 frames: 118,800 tokens
TOY = FULL | {"num_attention_heads": 8, "num_layers": 1, "num_single_layers": 1, "text_embed_dim": 64}
TOY_LATENT = (1, 16, 2, 8, 8)
TEXT, VALID = 256, 201
SHARES = (2, 4, 8)


@dataclass(frozen=True)
class Variant:
    """What a step on one rank has beside the kernel that `auto` chooses."""

    compiled: bool = False
    cache_hit: bool = False
    """First Block Cache skips all blocks but the first."""
    fp8: bool = False
    """The blocks' linear layers are in FP8: row-wise products where the device has them, else the weights alone."""


VARIANTS = {
    "+ compile": Variant(compiled=True),
    "+ cache hit": Variant(cache_hit=True),
    "+ compile + cache hit": Variant(compiled=True, cache_hit=True),
    # From here on the model stays in FP8.
    "+ FP8": Variant(fp8=True),
    "+ FP8 + compile": Variant(fp8=True, compiled=True),
    "+ FP8 + cache hit": Variant(fp8=True, cache_hit=True),
    "+ FP8 + compile + cache hit": Variant(fp8=True, compiled=True, cache_hit=True),
}


class Bench:
    """Times steps of one model on one device."""

    def __init__(self, config: dict[str, Any], latent: tuple[int, ...], repeats: int):
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.adapter, self.config, self.latent, self.repeats = HunyuanVideoAdapter(), config, latent, repeats
        model_class = self.adapter.model_class()
        with torch.device("meta"):
            model: nn.Module = model_class(**config)
        self.model = model.to_empty(device=self.device).to(self.dtype).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.02)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        self.x, self.timestep = random(*latent), torch.tensor([500.0], device=self.device)
        self.conditioning = {
            "context": random(1, TEXT, config["text_embed_dim"]),
            "y": random(1, 768),
            "guidance": torch.tensor([6.0], device=self.device, dtype=self.dtype),
            "attention_mask": (torch.arange(TEXT, device=self.device)[None] < VALID).long(),
        }
        self.out = torch.empty_like(self.x)
        self.scheme = ""
        """Of the layers in FP8, if any are."""

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of the repeats, after a warm-up."""
        times = []
        for _ in range(self.repeats + 1):
            self._settle()
            began = time.perf_counter()
            with torch.no_grad():
                run()
            self._settle()
            times.append(time.perf_counter() - began)
        return median(times[1:])

    def step(self, context: StepContext) -> None:
        prepared = self.adapter.prepare(self.conditioning)
        self.adapter.step(self.model, self.x, self.timestep, prepared, self.out, context)

    def variant(self, variant: Variant) -> float | str:
        """Seconds of a step, or why there are none."""
        if variant.fp8:
            self.quantise()
        context = SoloContext(select("auto", self.device))
        blocks = CompiledBlocks(CompileSettings(), lambda: None) if variant.compiled else None
        context.compiler = blocks
        cache = FirstBlockCache(inf, self.device, most_in_a_row=0)

        def step() -> None:
            if variant.cache_hit:
                cache.begin_step(Degrees(), active=True)
                context.cache = StepPasses(cache, "step", self.latent, lambda sums: None)
            self.step(context)

        seconds = self.seconds(step)  # compiles, and fills the cache, in the warm-up
        return f"not available: {blocks.failure}" if blocks is not None and blocks.failure else seconds

    def quantise(self) -> None:
        """Puts the blocks' linear layers into FP8, but for their modulation; there is no way back."""
        works = not support(self.device)[DYNAMIC[0]]
        self.scheme = DYNAMIC[0] if works else WEIGHT_ONLY
        for blocks in (self.model.transformer_blocks, self.model.single_transformer_blocks):
            for path, module in list(blocks.named_modules()):  # type: ignore[union-attr]
                if type(module) is nn.Linear and ".norm" not in path:
                    parent, _, name = path.rpartition(".")
                    setattr(blocks.get_submodule(parent), name, fp8_layer(module, self.scheme))  # type: ignore[operator]

    def stock(self) -> None:
        """diffusers' own forward, which masks the padding instead of trimming it."""
        self.model(
            hidden_states=self.x,
            timestep=self.timestep,
            encoder_hidden_states=self.conditioning["context"],
            encoder_attention_mask=self.conditioning["attention_mask"],
            pooled_projections=self.conditioning["y"],
            guidance=self.conditioning["guidance"] * 1000,
            return_dict=False,
        )

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def share(bench: Bench, world_size: int) -> Iterator[StepContext]:
    """Rank 0 of a Ulysses group of `world_size`, without peers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    control = ControlPage.create()
    control.reset(world_size)
    try:
        ranks = Ranks((1.0,) * world_size, bench.device, select("auto", bench.device), alone=True)
        yield ParallelContext(ranks, ranks.mesh(Degrees(ulysses=world_size)), control)
    finally:
        control.close()
        dist.destroy_process_group()


def measure(toy: bool) -> dict[str, Any]:
    """All figures, with what they were measured on."""
    bench = Bench(TOY, TOY_LATENT, 1) if toy else Bench(FULL, FULL_LATENT, 3)
    rows: dict[str, Any] = {"stock diffusers, masked": bench.seconds(bench.stock)}
    kernels = ("auto", "sdpa", "cudnn", "flash", "sage") if bench.device.type == "cuda" else ("auto", "sdpa")
    for name in kernels:
        try:
            kernel = select(name, bench.device)
            rows[f"one rank, {name}"] = bench.seconds(lambda kernel=kernel: bench.step(SoloContext(kernel)))
        except (ImportError, EngineError, RuntimeError) as error:
            rows[f"one rank, {name}"] = f"not available: {str(error).splitlines()[0]}"
    for world_size in SHARES:
        with share(bench, world_size) as context:
            rows[f"share of rank 0 of {world_size}"] = bench.seconds(lambda context=context: bench.step(context))
    for name, variant in VARIANTS.items():
        rows[f"one rank, auto {name}"] = bench.variant(variant)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "dtype": str(bench.dtype),
        "fp8": bench.scheme,
        "latent": bench.latent,
        "text": [TEXT, VALID],
        "seconds_per_step": rows,
        "ceilings_tflops": ceilings(bench, toy),
    }


def ceilings(bench: Bench, toy: bool) -> dict[str, float]:
    """What this device reaches on one large GEMM and one attention of the model's shape, in TFLOP/s."""
    hidden = bench.config["num_attention_heads"] * 128
    rows, tokens = (64, 128) if toy else (16384, 118_800 + VALID)
    a, b = (torch.randn(s, device=bench.device, dtype=bench.dtype) for s in ((rows, hidden), (hidden, 4 * hidden)))
    shape = (1, bench.config["num_attention_heads"], tokens, 128)
    q = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    kernel = select("auto", bench.device)
    gemm, attention = bench.seconds(lambda: a @ b), bench.seconds(lambda: kernel(q, q, q))
    return {
        "gemm": 2 * rows * hidden * 4 * hidden / gemm / 1e12,
        "attention": 4 * tokens**2 * hidden / attention / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that the script runs")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    result = measure(options.toy)
    for name, value in result["seconds_per_step"].items():
        print(f"{name:40}{value if isinstance(value, str) else f'{value:10.3f} s'}")
    for name, value in result["ceilings_tflops"].items():
        print(f"ceiling, {name:31}{value:10.1f} TFLOP/s")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        file = options.output / f"hunyuan_video_{result['hardware'].replace(' ', '_')}_{result['date']}.json"
        file.write_text(json.dumps(result, indent=2))
        print(file)


if __name__ == "__main__":
    main()
