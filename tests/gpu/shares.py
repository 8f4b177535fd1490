"""One rank's share of a step of full-size models, on one device without peers: `python -m tests.gpu.shares [--toy]`.

PyTorch's "fake" process group moves no data: arithmetic, packing and launches are those of rank 0 of a Ulysses group,
and the link is not in the figures. Of HunyuanVideo's 20 + 40 and FLUX's 19 + 38 blocks it times steps with one slice of
1 + 2 and with two; the difference is a slice's time, and the whole step is the first one and the other slices. Weights
are random; times do not depend on them. Prints a line for each figure, and JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.adapters.registry import FAMILIES
from parallel.attention.kernels import select
from parallel.degrees import Degrees
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks

WORLDS = (1, 2, 4, 8)
BLOCKS = {
    "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 2, "num_single_layers": 4,
    "pooled_projection_dim": 768,
}  # fmt: skip
TOY = {"num_attention_heads": 2}


@dataclass(frozen=True)
class Model:
    """A model's sizes, and those of its step."""

    family: str
    title: str
    config: dict[str, Any]
    slices: int
    """How many times 1 + 2 blocks it has."""
    latent: tuple[int, ...]
    toy_latent: tuple[int, ...]
    text: int
    width: int
    """Of the text's embeddings."""
    timestep: float


MODELS = (
    Model(
        "flux", "FLUX.1, 1024 × 1024", {"in_channels": 64, "guidance_embeds": True, "joint_attention_dim": 4096},
        19, (1, 16, 128, 128), (1, 16, 16, 16), 512, 4096, 0.5,
    ),
    Model(
        "hunyuan_video", "HunyuanVideo, 720p, 129 frames",
        {
            "in_channels": 16, "out_channels": 16, "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 4096,
        },
        20, (1, 16, 33, 90, 160), (1, 16, 2, 8, 8), 256, 4096, 500.0,
    ),
)  # fmt: skip


class Step:
    """Steps of a part of a model on one device."""

    def __init__(self, model: Model, device: torch.device, toy: bool):
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self._adapter = FAMILIES[model.family]()
        config = model.config | BLOCKS | (TOY if toy else {})
        with torch.device("meta"):
            network: Any = self._adapter.model_class()(**config)
        self._network = network.to_empty(device=device).to(self.dtype).eval().requires_grad_(False)
        for parameter in self._network.parameters():
            parameter.normal_(0, 0.02)
        self._blocks = {
            name: getattr(self._network, name) for name in ("transformer_blocks", "single_transformer_blocks")
        }
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        self._x = random(*(model.toy_latent if toy else model.latent))
        self._timestep = torch.tensor([model.timestep], device=device)
        self._conditioning = {
            "context": random(1, 16 if toy else model.text, model.width),
            "y": random(1, 768),
            "guidance": torch.tensor([4.0], device=device, dtype=self.dtype),
        }
        self._out = torch.empty_like(self._x)

    def milliseconds(self, context: ParallelContext, slices: int, repeats: int) -> float:
        """Median of a step with so many slices of 1 + 2 blocks."""
        for (name, blocks), count in zip(self._blocks.items(), (slices, 2 * slices), strict=True):
            setattr(self._network, name, nn.ModuleList(list(blocks)[:count]))
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            self._settle()
            began = time.perf_counter()
            with torch.no_grad():
                prepared = self._adapter.prepare(self._conditioning)
                self._adapter.step(self._network, self._x, self._timestep, prepared, self._out, context)
            self._settle()
            times.append(1000 * (time.perf_counter() - began))
        return median(times[1:])

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def share(device: torch.device, world_size: int) -> Iterator[ParallelContext]:
    """Rank 0 of a Ulysses group of `world_size`, without peers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    control = ControlPage.create()
    control.reset(world_size)
    try:
        ranks = Ranks((1.0,) * world_size, device, select("auto", device), alone=True)
        yield ParallelContext(ranks, ranks.mesh(Degrees(ulysses=world_size)), control)
    finally:
        control.close()
        dist.destroy_process_group()


def measure(model: Model, device: torch.device, toy: bool) -> Iterator[tuple[int, dict[str, float | str]]]:
    """For each world size: milliseconds of a whole step, and the peak of memory with 2 + 4 blocks."""
    step, repeats = Step(model, device, toy), 1 if toy else 3
    for world_size in WORLDS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with share(device, world_size) as context:
                one, two = (step.milliseconds(context, slices, repeats) for slices in (1, 2))
        except torch.OutOfMemoryError:
            yield world_size, {"failed": "out of memory"}
            continue
        figures: dict[str, float | str] = {"ms_per_step": round(one + (model.slices - 1) * (two - one), 2)}
        if device.type == "cuda":
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        yield world_size, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that it runs, also on a CPU")
    toy = parser.parse_args().toy
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    result: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        title = f"{model.title} (toy)" if toy else model.title
        result[title] = {}
        for world_size, figures in measure(model, device, toy):
            result[title][str(world_size)] = figures
            shown = ", ".join(f"{name} {value}" for name, value in figures.items())
            print(f"{title}, share of 1 of {world_size}: {shown}", flush=True)
            print(json.dumps(result), flush=True)  # what is known when the time is up


if __name__ == "__main__":
    main()
