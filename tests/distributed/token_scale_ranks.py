"""One rank of the token scales' test: `python -m tests.distributed.token_scale_ranks RANK WORLD STORE RESULTS`.

A layer that is like ComfyUI's in nvfp4 says by which scale it would divide its input: within all splits of the world,
on tokens of which each rank has some and the last one none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.attention.kernels import Sdpa
from parallel.degrees import Degrees
from parallel.split import SequenceRanks
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks
from parallel.worker.token_scales import TokenScales
from tests.distributed.devices import meet


class Layer(nn.Module):
    quant_format = "nvfp4"
    _full_precision_mm = False

    def forward(self, x: Tensor) -> Any:
        return getattr(self, "input_scale", None)


def tokens(world: int) -> Tensor:
    """[S, C], with the largest value among one rank's only."""
    x = torch.randn(world * 5, 8, generator=torch.Generator().manual_seed(1))
    x[-2, 3] = -17.0
    return x


def main(rank: int, world: int, store: str, results: str) -> None:
    device = meet(rank, world, store, timeout_s=30)
    ranks = Ranks((1.0,) * world, device, Sdpa())
    control = ControlPage.create()
    control.reset(world)
    x = tokens(world).to(device)
    mine = torch.tensor_split(x, world - 1)[rank] if rank < world - 1 else x[:0]
    layers = nn.ModuleDict({"a": Layer(), "b": Layer()})
    scales = TokenScales(layers)
    found: dict[str, list[float] | None] = {}
    for ring in (degree for degree in range(1, world + 1) if world % degree == 0):
        mesh = ranks.mesh(Degrees(ulysses=world // ring, ring=ring))
        sequence = ranks.sequence(mesh, ParallelContext(ranks, mesh, control), "sdpa", "step")
        with scales.over(sequence):
            found[str(ring)] = [layer(mine).item() for layer in layers.values()]
        assert all("input_scale" not in vars(layer) for layer in layers.values())
    with scales.over(SequenceRanks((1.0,))):
        found["alone"] = layers["a"](mine)
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
