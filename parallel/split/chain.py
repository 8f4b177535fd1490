"""Describes, as data, which blocks of a network a cache between steps may skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Sequence of blocks that each add to the hidden states of the latent's tokens."""

    blocks: Mapping[str, str]
    """Maps each list of blocks to the arguments that are returned as its results when a block is skipped, in the order
    of the results, separated by blanks. The lists are in execution order; one without blocks is ignored."""
    hidden: str
    """Name of the hidden states: an argument of the first list that its plan cuts, and one of its results. In a joint
    sequence of a later list they are the last tokens."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Lists, in the form of `blocks`, that run between these, and whose results are unused when these are skipped."""
    leave: str = ""
    """Module and argument by which the hidden states leave the blocks, e.g. `final_layer.x`. By default they leave as
    the last block's result, before it is joined. Needed where something is added to them after the last block."""
    modulated: str = ""
    """Tensor that TeaCache compares: an argument of the first block, or the input of one of its submodules, which is
    named here (before that submodule runs, the block must not have exchanged or changed anything). Empty: no
    TeaCache."""
