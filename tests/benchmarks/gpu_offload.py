"""Offloaded against replicated weights on one GPU: HunyuanVideo's sizes at 480p, with half of its blocks.

    python -m tests.benchmarks.gpu_offload           (a minute on a GPU with 30 GB free, and 15 GB of host memory)
    python -m tests.benchmarks.gpu_offload --toy     (seconds, also on a CPU, where it shows that the script runs)

Weights are random; times do not depend on them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from parallel.adapters.hunyuan_video import HunyuanVideoAdapter
from parallel.attention.kernels import select
from parallel.wire.shared import Segment
from parallel.worker.homes import Home, MakeHome, Replicated
from parallel.worker.offloaded import Offloaded
from parallel.worker.ranks import SoloContext

HALF = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 10,
    "num_single_layers": 20, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
LATENT = (1, 16, 33, 60, 106)  # 480p, 129 frames: 52,470 tokens
TOY = HALF | {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": 64}
TOY_LATENT = (1, 16, 2, 8, 8)
ROUNDS = 3


@dataclass
class Placed:
    """The model, its weights in one kind of home."""

    model: nn.Module
    home: Home


class Bench:
    """Runs steps of the same model, wherever its weights are."""

    def __init__(self, toy: bool):
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.adapter = HunyuanVideoAdapter()
        self._config, self._latent = (TOY, TOY_LATENT) if toy else (HALF, LATENT)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        self.x, self.timestep = random(*self._latent), torch.tensor([500.0], device=self.device)
        self.prepared = self.adapter.prepare(
            {
                "context": random(1, 200, self._config["text_embed_dim"]),  # type: ignore[arg-type]
                "y": random(1, 768),
                "guidance": torch.tensor([6.0], device=self.device, dtype=self.dtype),
            }
        )
        self.context = SoloContext(select("auto", self.device))

    def place(self, make: MakeHome) -> Placed:
        """The same weights for every home."""
        with torch.device("meta"):
            model = self.adapter.model_class()(**self._config).to(self.dtype).eval().requires_grad_(False)
        home = make(model, self.device)
        for i, (name, parameter) in enumerate(list(model.named_parameters())):
            mine, _ = home.share(name)
            values = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
            mine.copy_(values.normal_(0, 0.02, generator=torch.Generator(self.device).manual_seed(i)))
        return Placed(model, home)

    def step(self, placed: Placed) -> tuple[Tensor, float]:
        """The prediction, and the seconds it took."""
        out = torch.empty_like(self.x)
        self._settle()
        began = time.perf_counter()
        with torch.no_grad(), placed.home.in_use():
            self.adapter.step(placed.model, self.x, self.timestep, self.prepared, out, self.context)
        self._settle()
        return out, time.perf_counter() - began

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(toy: bool) -> dict[str, Any]:
    """`resident`: weights on the device, offloaded against replicated; `time`: of a step, likewise, the median of
    rounds that alternate; `same`: whether the predictions are equal to the bit."""
    bench = Bench(toy)

    def offloaded(model: nn.Module, device: torch.device) -> Home:
        return Offloaded(model, device, file=Segment.create("weights", 0), rank=0, ranks=1)

    replicated, other = bench.place(Replicated), bench.place(offloaded)
    same = torch.equal(bench.step(replicated)[0], bench.step(other)[0])  # the first steps are not timed
    rounds = [(bench.step(replicated)[1], bench.step(other)[1]) for _ in range(1 if toy else ROUNDS)]
    other.home.close()
    return {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "resident": other.home.nbytes / replicated.home.nbytes,
        "time": median(after / before for before, after in rounds),
        "seconds": [median(column) for column in zip(*rounds, strict=True)],
        "same": same,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that the script runs")
    print(json.dumps(measure(parser.parse_args().toy)))
