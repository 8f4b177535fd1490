"""The blocks of a network: what a plan's lists hold."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def reached_into(plan: Iterable[str]) -> set[str]:
    """Lists whose blocks have sites inside: their hooks do more than a compiled block can take along."""
    return {path.partition(".*.")[0] for path in plan if ".*." in path}


def blocks_of_any(network: nn.Module) -> list[nn.Module]:
    """Without a plan: the modules of the network's lists, and their parts, some of which may be called in their place
    (as UNets do)."""
    lists = [module for module in network.children() if isinstance(module, nn.ModuleList)]
    return [module for each in lists for block in each for module in (block, *block.children())]


def planned_blocks(network: nn.Module, plan: Iterable[str]) -> list[nn.Module]:
    """The modules of the lists that a plan names, in its order."""
    paths = dict.fromkeys(path.partition(".*.")[0] for path in plan)
    lists = [module for path in paths if isinstance(module := network.get_submodule(path), nn.ModuleList)]
    return list(dict.fromkeys(block for each in lists for block in each))
