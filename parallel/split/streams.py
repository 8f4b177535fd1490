"""Ownership of the tokens of each stream during one forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..attention.between import StreamAttention
from ..plan import AttentionPlan, shares
from .ranks import SequenceRanks

Names = tuple[str, ...]
"""Streams, concatenated in this order."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A sequence of tokens, split over the ranks in proportion to their weights.

    Each stream is split separately, instead of the joint sequence: so each phase of a network with dual- and
    single-stream blocks is balanced, and shapes on equal ranks are nearly equal.
    """

    total: int
    """Number of tokens as the model counts them."""
    kept: Tensor | None
    """Positions of the tokens that take part, int64; None: all. Padding is left out."""
    starts: tuple[int, ...]
    """Bounds of the ranks' shares: rank r owns the kept tokens starts[r] … starts[r + 1] − 1."""

    def count(self, rank: int) -> int:
        """Returns the number of tokens that the rank owns."""
        return self.starts[rank + 1] - self.starts[rank]

    def span(self, rank: int, *, phantom: bool) -> tuple[int, int]:
        """Returns the half-open range of the kept tokens that the rank works on.

        Args:
            phantom: a rank without a token gets the first one: blocks of several models cannot run without a token of
                each stream. This phantom is dropped before every exchange and in every join, so its result is never
                used.
        """
        first, last = self.starts[rank], self.starts[rank + 1]
        return (0, 1) if phantom and first == last else (first, last)

    def positions(self, rank: int, *, phantom: bool) -> Tensor:
        """Returns the positions of the rank's tokens; see `span`."""
        first, last = self.span(rank, phantom=phantom)
        return torch.arange(first, last) if self.kept is None else self.kept[first:last]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens of some streams together. Every block needs them several times."""

    total: int
    """Number of tokens of the whole streams, padding included."""
    counts: tuple[int, ...]
    """Number of tokens that each rank owns."""
    local: int
    """Number of tokens that this rank works on: its own, and phantoms."""
    phantoms: bool
    """True if this rank works on phantoms."""


@dataclass(frozen=True, slots=True)
class Way:
    """Exchange of one kind of attention, for fixed numbers of heads and tokens. Every block needs it."""

    queries: Names
    keys: Names
    exchange: StreamAttention
    as_it_is: bool
    """True if q, k and v are exchanged as the model has computed them."""


class SeenBefore:
    """Values that a site's blocks received earlier in this forward pass, so that the rules need not be applied again:
    blocks share tables, and hidden states keep their length.

    Attributes:
        parts: argument → the whole value, for as long as it lives, and its part.
        own: argument → size at which its rule returned it unchanged, so that it already is this rank's part; cleared
            when a stream is defined.
    """

    def __init__(self) -> None:
        self.parts: dict[str, tuple[Callable[[], Any], Any]] = {}
        self.own: dict[str, int] = {}

    def keep(self, name: str, value: Any, part: Any) -> None:
        """Remembers the part of `value`, but not where gradients flow, for the reason in `Streams.once`. `Streams.once`
        makes a part once for all sites; this also saves calling the rule."""
        if isinstance(value, Tensor):
            if not value.requires_grad:
                self.parts[name] = weakref.ref(value, lambda _: self.parts.pop(name, None)), part
        elif isinstance(value, tuple) and not torch.is_grad_enabled():
            self.parts[name] = (lambda: value), part  # a tuple supports no weak reference


@lru_cache(maxsize=64)
def _starts(count: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """Returns `Stream.starts` of `count` tokens; at least one for each rank if there are enough. Cached: exact
    fractions are slow, and every step needs the same ones."""
    return tuple(accumulate(shares(count, weights, minimum=1 if count >= len(weights) else 0), initial=0))


class Streams:
    """Streams of one forward pass, as they become known.

    Args:
        ranks: the ranks that share the sequence.

    Attributes:
        notes: values that rules keep from cut to join.
        given: arguments of the module whose arguments are being cut, before the cut: for rules that depend on another
            argument.
        routed: kind of attention → True once an attention of this kind has been exchanged.
        ways: kind of attention and shapes of q and k → its exchange; None: nothing is exchanged.
        skipping: True while the next blocks are skipped (by a cache, for instance): their hooks run, the blocks do not.
    """

    def __init__(self, ranks: SequenceRanks):
        self.ranks = ranks
        self.notes: dict[Any, Any] = {}
        self.given: Mapping[str, Any] = {}
        self.routed: dict[str, bool] = {}
        self.ways: dict[tuple[str, torch.Size, torch.Size], Way | None] = {}
        self.skipping = False
        self._streams: dict[str, Stream] = {}
        self._seen_before: dict[int, SeenBefore] = {}
        self._lengths: dict[Names, Lengths] = {}
        self._made: dict[Any, tuple[Any, Any]] = {}
        self._indices: dict[Any, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._streams

    def expect_nothing(self) -> None:
        """Cancels the expectation of attention that the hooks of a block have announced, since the block is skipped."""
        self.routed = {kind: done for kind, done in self.routed.items() if done}

    def define(self, name: str, total: int, kept: Tensor | None = None) -> None:
        """Splits a stream of `total` tokens, or only those at the positions `kept`, over the ranks."""
        count = total if kept is None else len(kept)
        starts = _starts(count, self.ranks.weights)
        self._streams[name] = Stream(total, None if kept is None else kept.cpu(), starts)
        self._lengths.clear()
        self.ways.clear()
        for seen in self._seen_before.values():
            seen.own.clear()

    def seen_before(self, site: object) -> SeenBefore:
        """Returns the `SeenBefore` of this site's blocks; the site outlives the pass."""
        if (known := self._seen_before.get(id(site))) is None:
            known = self._seen_before[id(site)] = SeenBefore()
        return known

    def forget_parts(self) -> None:
        """Clears what the pass has cached, at its end: entries that wait for their whole value to be freed are in
        reference cycles, and would stay until Python's garbage collector finds them."""
        self._made.clear()
        self._seen_before.clear()

    def described(self) -> Hashable:
        """Returns the number of tokens and the ownership of each stream known so far; the same on all ranks."""
        return tuple((name, stream.total, stream.starts) for name, stream in self._streams.items())

    def lengths(self, names: Names) -> Lengths | None:
        """Returns the lengths of these streams together; None while one of them is not known."""
        if (known := self._lengths.get(names)) is None:
            streams = [self._streams[name] for name in names if name in self._streams]
            if len(streams) < len(names):
                return None
            owned = [stream.count(self.ranks.rank) for stream in streams]
            known = self._lengths[names] = Lengths(
                total=sum(stream.total for stream in streams),
                counts=tuple(sum(stream.count(rank) for stream in streams) for rank in range(self.ranks.size)),
                local=sum(max(1, count) for count in owned),
                phantoms=not all(owned),
            )
        return known

    def total(self, names: Names) -> int:
        """Returns the number of tokens of the whole streams, padding included."""
        return self._known(names).total

    def counts(self, names: Names) -> tuple[int, ...]:
        """Returns the number of tokens that each rank owns."""
        return self._known(names).counts

    def local(self, names: Names) -> int:
        """Returns the number of tokens that this rank works on: its own, and phantoms."""
        return self._known(names).local

    def phantoms(self, names: Names) -> bool:
        """Returns True if this rank works on a phantom of one of these streams."""
        return self._known(names).phantoms

    def _known(self, names: Names) -> Lengths:
        lengths = self.lengths(names)
        assert lengths is not None, f"the plan asks for the length of {'+'.join(names)} before an argument gives it"
        return lengths

    def exchange(self, queries: Names, keys: Names, heads: int, groups: int) -> StreamAttention:
        """Returns the attention of queries with keys of these streams, over the ranks.

        Args:
            heads: number of heads of the queries.
            groups: number of heads of the keys, which divides `heads`.
        """
        tokens, ranks = (self.counts(queries), self.counts(keys)), self.ranks
        return ranks.attention(AttentionPlan(*tokens, heads, groups, ranks.weights, ranks.ring_degree))

    def index(self, names: Names, device: torch.device, rank: int | None = None) -> Tensor:
        """Returns positions in the whole streams, int64.

        Args:
            rank: selects this rank's tokens and phantoms; None: all tokens, in the order in which an exchange arranges
                them.
        """
        key = names, rank, device
        if key not in self._indices:
            streams = [self._streams[name] for name in names]
            offsets = list(accumulate((stream.total for stream in streams), initial=0))[:-1]
            parts = [
                stream.positions(each, phantom=rank is not None) + offset
                for each in (range(self.ranks.size) if rank is None else [rank])
                for stream, offset in zip(streams, offsets, strict=True)
            ]
            self._indices[key] = torch.cat(parts).to(device)
        return self._indices[key]

    def mine(self, names: Names, device: torch.device | None = None) -> Tensor:
        """Returns the positions of this rank's tokens and phantoms."""
        return self.index(names, device or torch.device("cpu"), self.ranks.rank)

    def take(self, value: Tensor, names: Names, dim: int) -> Tensor:
        """Returns this rank's part of a whole tensor, as a copy: blocks may work in place, and the whole can be
        freed."""
        streams = [self._streams[name] for name in names]
        if any(stream.kept is not None for stream in streams):
            return value.index_select(dim, self.mine(names, value.device))
        parts, offset = [], 0
        for stream in streams:  # slices, since an index would have to be copied to the device in every pass
            first, last = stream.span(self.ranks.rank, phantom=True)
            parts.append(value.narrow(dim, offset + first, last - first))
            offset += stream.total
        return (
            parts[0].clone(memory_format=torch.contiguous_format)
            if len(parts) == 1
            else torch.cat(parts, dim).contiguous()
        )

    def take_before(self, value: Tensor, names: Names, dim: int) -> Tensor:
        """Returns this rank's part of a tensor that holds all tokens of the streams but the last, and of the last
        stream only this rank's tokens."""
        total = self.total(names[:-1])
        before, own = value.split([total, value.shape[dim] - total], dim)
        return torch.cat([self.take(before, names[:-1], dim), own], dim)

    def without_phantoms(self, value: Tensor, names: Names, dim: int) -> Tensor:
        """Returns only the tokens that this rank owns."""
        if not self.phantoms(names):
            return value
        rank = self.ranks.rank
        parts = value.split([max(1, self._streams[name].count(rank)) for name in names], dim)
        owned = [part for part, name in zip(parts, names, strict=True) if self._streams[name].count(rank)]
        return torch.cat(owned, dim) if owned else value.narrow(dim, 0, 0)

    def with_phantoms(self, value: Tensor, names: Names, dim: int) -> Tensor:
        """Reverses `without_phantoms`, with zeros for the phantoms."""
        if not self.phantoms(names):
            return value
        counts = [self._streams[name].count(self.ranks.rank) for name in names]
        zeros = value.new_zeros([*value.shape[:dim], 1, *value.shape[dim + 1 :]])
        return torch.cat(
            [part if count else zeros for part, count in zip(value.split(counts, dim), counts, strict=True)], dim
        )

    def join(self, value: Tensor, names: Names, dim: int) -> Tensor:
        """Gathers the whole tensor from all ranks' parts, with zeros for padding. Collective: all ranks call it."""
        gathered = self.ranks.gather(self.without_phantoms(value, names, dim), dim, self.counts(names))
        streams = [self._streams[name] for name in names]
        if len(streams) == 1 and streams[0].kept is None:
            return gathered
        whole = value.new_zeros([*value.shape[:dim], self.total(names), *value.shape[dim + 1 :]])
        return whole.index_copy(dim, self.index(names, value.device), gathered)

    def once(self, key: Any, value: Any, make: Callable[[], Any]) -> Any:
        """Returns `make()`, called once in this forward pass for as long as `value` lives: all blocks share position
        tables.

        Where gradients flow, nothing is cached: under activation checkpointing a block that runs again must repeat the
        same operations.
        """
        with_gradients = value.requires_grad if isinstance(value, Tensor) else torch.is_grad_enabled()
        if with_gradients:
            return make()
        key = key, id(value)
        if key not in self._made:
            # A list supports no weak reference; it is kept, so that no other one gets its id.
            of = weakref.ref(value, lambda _: self._made.pop(key, None)) if isinstance(value, Tensor) else value
            self._made[key] = make(), of
        return self._made[key][0]
