"""Runs an unmodified diffusion transformer over the ranks that share its sequence.

A *plan* (`parallel/plans`) says, as data, which arguments of which modules are indexed by tokens. Hooks cut them to
this rank's tokens at the first block, attention exchanges tokens for heads (Ulysses) or passes keys around (ring), and
what leaves the last layer is joined. The way of the data:

    sites (what happens where) → hooks → rules (how an argument is cut and joined) → streams (who owns which tokens)
                                       → routes (how attention is reached) → attention (the exchange)

The model keeps its own code. Between the blocks it works on local tensors: concatenating two streams, or cutting one
off by its length, gives the same on a rank's tokens as on all of them.
"""

from .hooks import Split
from .ranks import SequenceRanks
from .sites import Plan, PlanError, Site

__all__ = ["Plan", "PlanError", "SequenceRanks", "Site", "Split"]
