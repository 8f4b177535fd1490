"""One rank's share of a step of full-size models, on one device without peers: `python -m tests.gpu.shares [--toy]`.

PyTorch's "fake" process group moves no data: arithmetic, packing and launches are those of rank 0 of a Ulysses group,
and the link is not in the figures. The networks are diffusers' classes under their split plans. Of HunyuanVideo's
20 + 40, FLUX's 19 + 38 and Wan's 40 blocks it times steps with one slice (1 + 2 blocks, or 1) and with two; the
difference is a slice's time, and the whole step is the first one and the other slices. Weights are random; times do not
depend on them. One rank alone runs HunyuanVideo with diffusers' mask of the text, for which PyTorch has slower kernels;
ranks that share a sequence drop it, so what they gain is not to be read from the figure of one. Prints a line for each
figure, and JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from tests.gpu.full_size import (
    FLUX,
    HUNYUAN_VIDEO,
    WAN,
    Model,
    default_device,
    inputs_of,
    network_of,
    settle,
    share,
    split,
)

WORLDS = (1, 2, 4, 8)
MODELS = (FLUX, HUNYUAN_VIDEO, WAN)


class Step:
    """Steps of a part of a model on one device."""

    def __init__(self, model: Model, device: torch.device, toy: bool):
        self._model, self._device = model, device
        self._network = network_of(model, 2, device, toy=toy)
        self._blocks = {name: list(self._network.get_submodule(name)) for name in model.blocks}
        self._inputs = inputs_of(model, device, toy=toy)

    def milliseconds(self, world_size: int, slices: int, repeats: int) -> float:
        """Median of rank 0's share of a step with so many slices of the blocks."""
        for name, count in self._model.of_slices(slices).items():
            setattr(self._network, name, nn.ModuleList(self._blocks[name][:count]))
        times = []
        with torch.no_grad(), share(self._device, world_size) as run, split(self._model, self._network) as planned:
            for _ in range(repeats + 1):  # the first one warms up
                settle(self._device)
                began = time.perf_counter()
                run(planned, partial(self._network, **self._inputs))
                times.append(1000 * (time.perf_counter() - began))
        return median(times[1:])


def measure(model: Model, device: torch.device, toy: bool) -> Iterator[tuple[int, dict[str, float | str]]]:
    """For each world size: milliseconds of a whole step, and the peak of memory with two slices of the blocks."""
    step, repeats = Step(model, device, toy), 1 if toy else 3
    for world_size in WORLDS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            one, two = (step.milliseconds(world_size, slices, repeats) for slices in (1, 2))
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
    device = default_device()
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
