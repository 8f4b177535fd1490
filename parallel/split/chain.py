"""Which blocks of a network a cache between steps may skip, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks that add to the hidden states of the latent's tokens, one after the other."""

    blocks: Mapping[str, str]
    """List of blocks → arguments that stand for its results when a block is skipped, in their order, separated by
    blanks. The lists in the order in which they run; an empty one is left out."""
    hidden: str
    """The hidden states: an argument of the first list that its plan cuts, and one of its results. In a joint sequence
    of a later list they are the last tokens."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Lists as in `blocks` that run between these, and whose results nobody reads when these are skipped."""
    leave: str = ""
    """Module and argument by which the hidden states leave, `final_layer.x`; by default it is the last block's result,
    before it is joined. Needed where something adds to them after the last block."""
    modulated: str = ""
    """What TeaCache compares: an argument of the first block, or a submodule of it, by what goes into it (the block
    must not have exchanged or changed anything by then). Without it there is no TeaCache."""
