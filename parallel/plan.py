"""Assignment of tokens and heads to ranks: one joint sequence, split by a plan that every rank computes identically.

After padding is trimmed, attention does not depend on the order of keys, so a rank may own any tokens. The streams of a
joint sequence (video, then text) are concatenated and cut into contiguous shares in proportion to the ranks' weights.
Shares may be uneven; a rank may own no text token, or no head. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from .errors import ConfigError

Range = tuple[int, int]
"""Half-open range: first index, one past the last."""


def shares(total: int, weights: Sequence[float], minimum: int = 0) -> tuple[int, ...]:
    """Splits `total` indivisible items in proportion to `weights`, by largest remainder.

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
    """Returns contiguous half-open ranges of these sizes, starting at 0."""
    ends = list(accumulate(sizes))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def spread(samples: int, groups: int) -> tuple[Range, ...]:
    """Returns the samples of each group: contiguous, as equal in number as possible; a group may get none."""
    return ranges(shares(samples, [1.0] * groups))


def share_of(batches: Sequence[int], group: int, groups: int) -> list[slice]:
    """Returns the samples of each request that `group` gets when all requests' samples are spread in order."""
    start, stop = spread(sum(batches), groups)[group]
    return [
        slice(min(max(start, first), last) - first, min(max(stop, first), last) - first)
        for first, last in ranges(batches)
    ]


@dataclass(frozen=True)
class AttentionPlan:
    """Assignment of tokens and heads to ranks in one attention.

    Ranks form `ring_degree` rows of Ulysses groups: each row owns a contiguous chunk of the sequence, and ranks of the
    same column own the same heads, whose keys and values are passed around the column's ring. With grouped queries,
    query heads stay with their key head.

    Args:
        tokens: number of queries of each rank.
        keys: number of keys of each rank.
        heads: number of query heads.
        groups: number of key heads; each serves heads / groups query heads.
        weights: relative speed of each rank.
        ring_degree: number of rows.
    """

    tokens: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    groups: int
    weights: tuple[float, ...]
    ring_degree: int = 1

    @classmethod
    def of_sequence(cls, total: int, heads: int, weights: tuple[float, ...], ring_degree: int = 1) -> AttentionPlan:
        """Plans one joint sequence of `total` tokens, cut in proportion to the ranks' weights.

        Raises:
            ConfigError: there are fewer tokens than ranks.
        """
        if total < len(weights):
            raise ConfigError(
                f"tokens is {total}; {len(weights)} ranks need one each: use fewer devices, or more tokens"
            )
        tokens = shares(total, weights, minimum=1)
        return cls(tokens, tokens, heads, heads, weights, ring_degree)

    @property
    def world_size(self) -> int:
        return len(self.weights)

    @cached_property
    def ulysses_degree(self) -> int:
        return self.world_size // self.ring_degree

    @cached_property
    def local_groups(self) -> tuple[int, ...]:
        columns = [sum(self.weights[c :: self.ulysses_degree]) for c in range(self.ulysses_degree)]
        return shares(self.groups, columns) * self.ring_degree

    @cached_property
    def local_heads(self) -> tuple[int, ...]:
        return tuple(count * (self.heads // self.groups) for count in self.local_groups)

    @cached_property
    def head_ranges(self) -> tuple[Range, ...]:
        return ranges(self.local_heads[: self.ulysses_degree]) * self.ring_degree

    @cached_property
    def token_ranges(self) -> tuple[Range, ...]:
        """Range of each rank's queries, in the order of the ranks."""
        return ranges(self.tokens)

    @cached_property
    def key_ranges(self) -> tuple[Range, ...]:
        """Range of each rank's keys, in the order of the ranks."""
        return ranges(self.keys)

    @property
    def joint(self) -> bool:
        """True if queries and keys are the same tokens, and heads are not grouped."""
        return self.tokens == self.keys and self.heads == self.groups

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Number of queries of each row."""
        return self._of_rows(self.tokens)

    @cached_property
    def key_chunks(self) -> tuple[int, ...]:
        """Number of keys of each row."""
        return self._of_rows(self.keys)

    def row(self, rank: int) -> slice:
        """Returns the ranks of `rank`'s Ulysses group."""
        start = rank // self.ulysses_degree * self.ulysses_degree
        return slice(start, start + self.ulysses_degree)

    def exchange_bytes(self, rank: int, batch: int, head_dim: int, itemsize: int) -> int:
        """Returns the bytes that `rank` sends to other ranks in one attention.

        Ulysses: q, k and v, and the result back, within the row. Ring: this rank sends the keys and values of every
        chunk once, except the next row's own.
        """
        heads, row = self.local_heads[rank], rank // self.ulysses_degree
        scatter = self.tokens[rank] * (self.heads - heads)
        scatter += 2 * self.keys[rank] * (self.groups - self.local_groups[rank])
        gather = (self.chunks[row] - self.tokens[rank]) * heads
        passed = sum(self.key_chunks) - self.key_chunks[(row + 1) % self.ring_degree]
        ring = 2 * passed * heads if self.ring_degree > 1 else 0
        return (scatter + gather + ring) * batch * head_dim * itemsize

    def _of_rows(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sum(counts[self.row(rank)]) for rank in range(0, self.world_size, self.ulysses_degree))
