"""Blocks of a network: the modules of the lists that a plan names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def reached_into(plan: Iterable[str]) -> set[str]:
    """Returns the lists whose blocks have sites inside, with hooks that do more than a compiled block can contain."""
    return {path.partition(".*.")[0] for path in plan if ".*." in path}


def blocks_of_any(network: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a network without a plan: the modules of its lists, and their children, since some networks
    (such as UNets) call these instead of the modules."""
    lists = [module for module in network.children() if isinstance(module, nn.ModuleList)]
    return [module for each in lists for block in each for module in (block, *block.children())]


def planned_blocks(network: nn.Module, plan: Iterable[str]) -> list[nn.Module]:
    """Returns the modules of the lists that a plan names, in the plan's order."""
    paths = dict.fromkeys(path.partition(".*.")[0] for path in plan)
    lists = [module for path in paths if isinstance(module := network.get_submodule(path), nn.ModuleList)]
    return list(dict.fromkeys(block for each in lists for block in each))
