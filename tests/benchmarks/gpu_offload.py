"""Offloaded against replicated weights on one GPU: HunyuanVideo's sizes at 480p, with half of its blocks.

    python -m tests.benchmarks.gpu_offload           (a minute on a GPU with 30 GB free, and 15 GB of host memory)
    python -m tests.benchmarks.gpu_offload --toy     (seconds, also on a CPU, where it shows that the script runs)

Weights are random; times do not depend on them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from parallel.plans.diffusers import PLANS
from parallel.split.blocks import planned_blocks
from parallel.wire.shared import Segment
from parallel.worker.homes import Home, MakeHome, Replicated, by_block
from parallel.worker.offloaded import Offloaded
from parallel.worker.packed import weights_of
from tests.gpu.full_size import HUNYUAN_VIDEO, Size, default_device, inputs_of, network_of, settle, split

MODEL = replace(HUNYUAN_VIDEO, size=Size((1, 16, 33, 60, 106), 200))  # 480p, 129 frames: 52,470 tokens
ROUNDS = 3


@dataclass
class Placed:
    """The model, its weights in one kind of home."""

    network: Any
    home: Home


class Bench:
    """Runs steps of the same model, wherever its weights are."""

    def __init__(self, toy: bool):
        self.device, self._toy = default_device(), toy
        self._inputs = inputs_of(MODEL, self.device, toy=toy)

    def place(self, make: MakeHome) -> Placed:
        """The same weights for every home."""
        network = network_of(MODEL, 2 if self._toy else MODEL.slices // 2, self.device, toy=self._toy)
        rest, blocks = by_block(weights_of(network, {}), planned_blocks(network, PLANS[MODEL.network]))
        return Placed(network, make(rest, blocks, self.device, lambda done, total: None))

    def step(self, placed: Placed) -> tuple[Tensor, float]:
        """The prediction, and the seconds it took."""
        with ExitStack() as during:
            during.enter_context(torch.no_grad())
            during.enter_context(split(MODEL, placed.network))
            settle(self.device)
            began = time.perf_counter()
            during.enter_context(placed.home.in_use())
            (out,) = placed.network(**self._inputs)
            settle(self.device)
        return out, time.perf_counter() - began


def measure(toy: bool) -> dict[str, Any]:
    """`resident`: weights on the device, offloaded against replicated; `time`: of a step, likewise, the median of
    rounds that alternate; `same`: whether the predictions are equal to the bit."""
    bench = Bench(toy)
    offloaded = partial(Offloaded, file=Segment.create("weights", 0), rank=0, ranks=1)
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
