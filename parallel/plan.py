"""Who owns which tokens and heads: one joint sequence, split by a plan that every rank computes alike.

After padding is trimmed, attention does not care about the order of keys, so a rank may own any tokens. The streams of
a joint sequence (video, then text) are laid end to end and cut into contiguous shares in proportion to the ranks'
weights. Shares may be uneven; a rank may own no text token, or no head. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate

from .errors import ConfigError

Range = tuple[int, int]
"""Half-open: first index, one past the last."""


def shares(total: int, weights: Sequence[float], minimum: int = 0) -> tuple[int, ...]:
    """Splits `total` indivisible things in proportion to `weights`, by largest remainder.

    Exact rational arithmetic, ties to the lower rank: every process gets the same answer.

    Args:
        total: number of tokens or heads.
        weights: relative speed of each rank, above 0.
        minimum: smallest share of a rank.

    Raises:
        ConfigError: `total` cannot give every rank its minimum.
    """
    ranks = len(weights)
    if total < minimum * ranks:
        raise ConfigError(f"{total} cannot be split over {ranks} ranks with at least {minimum} each")
    scale = sum(Fraction(w) for w in weights)
    ideal = [Fraction(w) * total / scale for w in weights]
    share = [int(x) for x in ideal]
    by_remainder = sorted(range(ranks), key=lambda r: (share[r] - ideal[r], r))
    for rank in by_remainder[: total - sum(share)]:
        share[rank] += 1
    for rank in range(ranks):
        while share[rank] < minimum:
            share[max(range(ranks), key=lambda r: (share[r] - minimum, -r))] -= 1
            share[rank] += 1
    return tuple(share)


def ranges(sizes: Sequence[int]) -> tuple[Range, ...]:
    """Contiguous half-open ranges of the given sizes, from 0."""
    ends = list(accumulate(sizes))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """The split of one joint attention over the ranks of a sequence-parallel group.

    Args:
        streams: token counts of the joint sequence's streams in order, e.g. (video, text). The first must have at
            least one token per rank; the others may be empty.
        heads: attention heads.
        weights: relative speed of each rank.

    Raises:
        ConfigError: fewer tokens than ranks.
    """

    streams: tuple[int, ...]
    heads: int
    weights: tuple[float, ...]
    token_ranges: tuple[Range, ...] = field(init=False)
    """Each rank's tokens of the joint sequence."""
    head_ranges: tuple[Range, ...] = field(init=False)
    """Each rank's heads between the two exchanges."""

    def __post_init__(self) -> None:
        world = len(self.weights)
        if self.streams[0] < world:
            raise ConfigError(
                f"devices gives {world} ranks, but this latent has only {self.streams[0]} tokens;"
                f" at least one token per rank is needed: use fewer devices or a larger size"
            )
        object.__setattr__(self, "token_ranges", ranges(shares(sum(self.streams), self.weights, minimum=1)))
        object.__setattr__(self, "head_ranges", ranges(shares(self.heads, self.weights)))

    @property
    def world_size(self) -> int:
        return len(self.weights)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.token_ranges)

    @property
    def local_heads(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.head_ranges)

    @property
    def leader(self) -> int:
        """A rank that owns a head, so that no rank can finish an attention before the leader has joined it."""
        return next(rank for rank, heads in enumerate(self.local_heads) if heads)

    def stream_ranges(self, rank: int) -> tuple[Range, ...]:
        """The rank's tokens within each stream, counted from that stream's start; empty ranges are (n, n)."""
        start, stop = self.token_ranges[rank]
        local = []
        for first, last in ranges(self.streams):
            inside = min(max(start, first), last), min(max(stop, first), last)
            local.append((inside[0] - first, inside[1] - first))
        return tuple(local)

    def exchange_bytes(self, rank: int, batch: int, head_dim: int, itemsize: int) -> int:
        """Bytes that `rank` sends to other ranks in one attention: q, k, v out and the result back."""
        tokens, heads = self.tokens[rank], self.local_heads[rank]
        scatter = 3 * tokens * (self.heads - heads)
        gather = (sum(self.streams) - tokens) * heads
        return (scatter + gather) * batch * head_dim * itemsize
