"""One rank of a world that shares out a model's weights: how many blocks it has at a time, and what comes out.

python -m tests.distributed.sharded_ranks RANK WORLD STORE RESULTS CHECKPOINT
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.adapters.base import StepContext
from parallel.attention.kernels import Sdpa
from parallel.worker.homes import MakeHome, Replicated
from parallel.worker.ranks import SoloContext
from parallel.worker.resident import ResidentModel
from parallel.worker.sharded import Sharded
from tests.distributed.devices import meet
from tests.distributed.tiny_models import Inputs, on

INPUTS = Inputs(frames=3, height=10, width=6, valid=(5,))


class Watched(SoloContext):
    """Every rank computes the whole sequence, and counts the blocks that it has before each block.

    Args:
        stop_before: block before which a step ends, as a cancelled one does.
    """

    def __init__(self, blocks: list[nn.Module], stop_before: int | None = None):
        super().__init__(Sdpa())
        self._blocks, self._stop_before = blocks, stop_before
        self.counts: list[int] = []

    def enter_block(self, plan: Any) -> None:
        self.counts.append(count_whole(self._blocks))
        if self._stop_before is not None and len(self.counts) > self._stop_before:
            raise InterruptedError


def count_whole(blocks: list[nn.Module]) -> int:
    return sum(not isinstance(next(block.parameters()), DTensor) for block in blocks)


def step(model: ResidentModel, context: StepContext) -> Tensor:
    x, timestep, conditioning = on(model.device, INPUTS)
    out = torch.empty_like(x)
    prepared = model.adapter.prepare(conditioning)
    with torch.no_grad(), model.home.in_use():
        model.adapter.step(model.model, x, timestep, prepared, out, context)
    return out


def blocks_of(model: ResidentModel) -> list[nn.Module]:
    lists: Any = model.model
    return [*lists.transformer_blocks._modules.values(), *lists.single_transformer_blocks._modules.values()]


def main(rank: int, world: int, store: str, results: str, path: str) -> None:
    device = meet(rank, world, store)

    def load(home: MakeHome) -> ResidentModel:
        recipe = {"path": path, "weight_dtype": "float32", "compute_dtype": "float32"}
        return ResidentModel(recipe, device, lambda done, total: None, home)

    expected = step(load(Replicated), SoloContext(Sdpa()))
    answers = []
    for ahead in (False, True):
        model = load(partial(Sharded, group=dist.group.WORLD, ahead=ahead))
        blocks = blocks_of(model)
        whole = Watched(blocks)
        answer: dict[str, Any] = {"equal": [torch.equal(step(model, whole), expected)], "counts": whole.counts}
        for stop_before in (0, 2):
            try:
                step(model, Watched(blocks, stop_before))
            except InterruptedError:
                answer.setdefault("left", []).append(count_whole(blocks))
        answer["equal"].append(torch.equal(step(model, SoloContext(Sdpa())), expected))
        answer["after"] = count_whole(blocks)
        answers.append(answer)
    Path(results).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
