"""One rank of a world that shares out a model's weights: how many blocks it has at a time, and what comes out.

python -m tests.distributed.sharded_ranks RANK WORLD STORE RESULTS FOLDER
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.split import SequenceRanks
from parallel.split.blocks import planned_blocks
from parallel.worker.homes import MakeHome, Replicated
from parallel.worker.sharded import Sharded
from parallel.worker.split_network import SplitNetwork
from tests.distributed.devices import meet
from tests.distributed.tiny_models import Inputs, arguments, on, recipe_of

INPUTS = Inputs(frames=3, height=10, width=6, valid=(5,))


class Watched:
    """A network whose ranks share a sequence, and its blocks."""

    def __init__(self, path: str, device: torch.device, rank: int, world: int, home: MakeHome):
        recipe = recipe_of(Path(path), "cpu").to_json()
        self.network = SplitNetwork(recipe, device, lambda done, total: None, home)
        self._blocks = planned_blocks(self.network._network, self.network._plan)
        self._ranks = SequenceRanks((1.0,) * world, rank, ulysses=dist.group.WORLD)
        self._request = on(device, INPUTS.make())

    def step(self, stop_before: int | None = None) -> tuple[Tensor, list[int]]:
        """The prediction, and how many blocks this rank had before each block.

        Args:
            stop_before: block before which the step ends, as a cancelled one does.
        """
        counts: list[int] = []

        def enter_block() -> None:
            counts.append(self.whole)
            if stop_before is not None and len(counts) > stop_before:
                raise InterruptedError

        self._ranks.enter_block = enter_block
        given = {"args": [], "named": arguments(self._request)}
        return self.network._run("forward", given, self._ranks)[0], counts

    @property
    def whole(self) -> int:
        """Blocks whose weights are here."""
        return sum(not any(parameter.is_meta for parameter in block.parameters()) for block in self._blocks)


@torch.no_grad()
def main(rank: int, world: int, store: str, results: str, path: str) -> None:
    device = meet(rank, world, store)
    watched = partial(Watched, path, device, rank, world)
    expected, _ = watched(Replicated).step()
    answers = []
    for ahead in (False, True):
        model = watched(partial(Sharded, group=dist.group.WORLD, ahead=ahead))
        actual, counts = model.step()
        answer: dict[str, Any] = {"equal": [torch.equal(actual, expected)], "counts": counts, "left": []}
        for stop_before in (0, 2):
            try:
                model.step(stop_before)
            except InterruptedError:
                answer["left"].append(model.whole)
        answer["equal"].append(torch.equal(model.step()[0], expected))
        answer["after"] = model.whole
        answers.append(answer)
    Path(results).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
