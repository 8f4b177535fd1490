"""The homes of a network's weights, by the host's word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..wire.shared import Segment
from .network_offloaded import Offloaded
from .network_sharded import Sharded
from .network_weights import MakeNetworkHome, Replicated
from .ranks import Ranks


def make_home(wanted: Mapping[str, Any], ranks: Ranks, take: Callable[[str], Segment]) -> MakeNetworkHome:
    """Where the host wants a network's weights.

    Args:
        wanted: `mode`, and what it needs: `sharing`, the ranks of a sequence; `segment`, an empty memory file.
        take: a memory file by its name, which belongs to the home from then on.
    """
    if wanted["mode"] == "shard":
        return partial(Sharded, group=ranks.weights_group(wanted["sharing"]))
    if wanted["mode"] == "offload":
        return partial(Offloaded, file=take(wanted["segment"]), rank=ranks.rank, ranks=ranks.world_size)
    return Replicated
