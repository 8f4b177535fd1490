"""Which weights of a sharded network travel; that results are the same is tested in comfyui/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.worker import network_sharded
from parallel.worker.network_sharded import Sharded
from parallel.worker.network_weights import by_block
from parallel.worker.packed import weights_of


class OneRank:
    """Stands for a process group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_blocks_that_a_cache_skips_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []

    def gather(whole: Tensor, mine: Tensor, group: Any, async_op: bool) -> None:
        gathered.append(len(mine))
        whole.copy_(mine)

    monkeypatch.setattr(network_sharded.dist, "all_gather_into_tensor", gather)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(1, 4)
    expected = network(x)
    rest, blocks = by_block(weights_of(network, {}), list(network))
    home = Sharded(rest, blocks, torch.device("cpu"), lambda done, total: None, group=OneRank())  # type: ignore[arg-type]
    with home.in_use():
        assert torch.equal(network(x), expected)
    assert len(gathered) == 1 + 3, "what belongs to no block, and each block"
    gathered.clear()
    network[0].register_forward_hook(lambda *_: setattr(home, "skipping", lambda: True))
    for block in (network[1], network[2]):
        monkeypatch.setattr(block, "forward", lambda x: x)
    with home.in_use():
        network(x)
    assert len(gathered) == 1 + 1
