"""Runs an unmodified diffusion transformer over the ranks that share its sequence.

A *plan* (`parallel/plans`) says, as data, which arguments of which modules are indexed by tokens. Hooks cut these
arguments to this rank's tokens at the first block, attention exchanges tokens for heads (Ulysses) or passes keys
around a ring, and the output of the last layer is joined. The data flow:

    sites (what happens where) → hooks → rules (how an argument is cut and joined) → streams (who owns which tokens)
                                       → routes (how attention is reached) → attention (the exchange)

The model keeps its own code. Between the blocks it works on local tensors: concatenating two streams, or slicing one
off by its length, has the same effect on a rank's tokens as on all of them.
"""

from .hooks import Split
from .ranks import SequenceRanks
from .sites import Plan, PlanError, Site

__all__ = ["Plan", "PlanError", "SequenceRanks", "Site", "Split"]
