"""Rules that plans are written in: how a value is cut to a rank's tokens, and joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .sites import PlanError
from .streams import Lengths, Names, Streams


@dataclass(frozen=True)
class Tokens:
    """A tensor with the tokens of `streams`, concatenated along `dim`. A size of 1 applies to all tokens.

    A new stream gets its length from this tensor: the size minus the lengths of the known streams.
    """

    BY_VALUE_ALONE: ClassVar = True
    """See `sites.by_value_alone`."""
    BY_SIZE_ALONE: ClassVar = True
    """See `sites.by_size_alone`."""

    streams: Names
    dim: int = 1

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts […, S, …] to […, S_r, …]."""
        if not isinstance(value, Tensor) or value.ndim <= self.dim:
            raise PlanError(f"expected a tensor with the tokens of {self} along dim {self.dim}")
        size, lengths = value.shape[self.dim], streams.lengths(self.streams)
        if lengths is None:
            lengths = self._defined(size, streams)
        if size == 1 or size == lengths.local != lengths.total:
            return value
        if size == lengths.total:
            return streams.once((self.streams, self.dim), value, lambda: streams.take(value, self.streams, self.dim))
        raise PlanError(
            f"dim {self.dim} is neither 1, the whole {lengths.total} tokens of {self}, nor this rank's {lengths.local}"
        )

    def _defined(self, size: int, streams: Streams) -> Lengths:
        """Defines the new stream, whose length is the rest of `size`, and returns the lengths."""
        new = [name for name in self.streams if name not in streams]
        known = streams.total(tuple(name for name in self.streams if name in streams))
        if len(new) > 1 or size <= known:
            raise PlanError(f"dim {self.dim} does not tell the lengths of {', '.join(new)} (known: {known} tokens)")
        streams.define(new[0], size - known)
        lengths = streams.lengths(self.streams)
        assert lengths is not None
        return lengths

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Joins […, S_r, …] to […, S, …]."""
        local = streams.local(self.streams)
        if value.shape[self.dim] != local:
            raise PlanError(f"dim {self.dim} is not this rank's {local} tokens of {self}")
        return streams.join(value, self.streams, self.dim)

    def __str__(self) -> str:
        return "+".join(self.streams)


@dataclass(frozen=True)
class Last:
    """A tensor whose values along dim 1 belong to the last tokens of `streams`. The model pads it with zeros in
    front."""

    BY_VALUE_ALONE: ClassVar = True
    """See `sites.by_value_alone`."""

    streams: Names

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, T, …] to [B, T_r, …]: the values of this rank's tokens among the last ones; there may be none."""
        before = streams.total(self.streams) - value.shape[1]

        def own() -> Tensor:
            index = streams.mine(self.streams) - before
            return value.index_select(1, index[index >= 0].to(value.device))

        return streams.once(self, value, own)


@dataclass(frozen=True)
class Own:
    """A result that is whole, since the module has averaged over all tokens; this rank continues with its own
    tokens."""

    rule: Tokens

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts […, S, …] to […, S_r, …]."""
        return self.rule.cut(value, streams)


@dataclass(frozen=True)
class Ranges:
    """Ranges [(start, stop, …)] of the tokens of `streams`; later items may be tensors with one value per token of the
    range."""

    streams: Names
    behind: str = ""
    """Stream by whose length on this rank the model has shifted the ranges; this is corrected to its whole length."""

    def cut(self, value: Sequence[Any], streams: Streams) -> list[Any]:
        """Returns the ranges that contain tokens of this rank, as positions in its own tokens."""
        return streams.once(self, value, lambda: self._own(value, streams))

    def _own(self, value: Sequence[Any], streams: Streams) -> list[Any]:
        if self.behind:
            moved = streams.total((self.behind,)) - streams.local((self.behind,))
            value = [(start + moved if start else 0, stop + moved, *rest) for start, stop, *rest in value]
        parts = (range_of(each, self.streams, streams) for each in value)
        return [part for part in parts if part[0] < part[1]]


def range_of(item: Sequence[Any], names: Names, streams: Streams, rank: int | None = None) -> tuple[Any, ...]:
    """Converts (start, stop, …) of the whole streams to a rank's own tokens; by default this rank's."""
    start, stop, *rest = item
    index = streams.index(names, torch.device("cpu"), streams.ranks.rank if rank is None else rank)
    stop = streams.total(names) if stop is None else stop
    inside = ((index >= start) & (index < stop)).nonzero().flatten()
    first = int(inside[0]) if len(inside) else 0
    rest = [each[(index[inside] - start).to(each.device)] if isinstance(each, Tensor) else each for each in rest]
    return (first, first + len(inside), *rest)


@dataclass(frozen=True)
class Before:
    """A number of tokens at the start of `streams`, which every block receives for the whole streams."""

    streams: Names

    def cut(self, value: int, streams: Streams) -> int:
        """Returns the number of them that are this rank's."""
        return int((streams.mine(self.streams) < value).sum())


@dataclass(frozen=True)
class Grouped:
    """A tensor of `ndim` dims with one value per token, or per group of equally many tokens (a frame), along dim 1.
    With fewer dims, or a size of 1, it applies to all tokens.

    Values per group become values per token: a rank's tokens may begin and end within a group, and models derive the
    tokens of a group from lengths.

    Args:
        cut_off: the tokens may end within a group; the length of a group is then rounded up.
    """

    BY_VALUE_ALONE: ClassVar = True
    """See `sites.by_value_alone`."""

    stream: str
    ndim: int
    cut_off: bool = False

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, G, …] to [B, S_r, …]."""
        groups = value.shape[1] if value.ndim == self.ndim else 1
        if groups == 1:
            return value
        total = streams.total((self.stream,))
        if total % groups and not self.cut_off:
            raise PlanError(f"{groups} groups along dim 1 do not divide the {total} tokens of {self.stream}")
        each = -(-total // groups)

        def expanded() -> Tensor:
            return value.index_select(1, streams.mine((self.stream,), value.device) // each)

        return streams.once((self, self.stream), value, expanded)


@dataclass(frozen=True)
class OwnGroups:
    """A tensor with `entries` rows along dim 1 for each group of equally many tokens of `stream` (audio of a frame).
    Cut to the groups that contain tokens of this rank.

    Args:
        until: name of another argument, which is the number of tokens at the start that are in groups; empty: all are.
    """

    stream: str
    entries: int = 1
    until: str = ""

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, G · entries, …] to [B, G_r · entries, …], at least one group."""
        total = streams.given[self.until] if self.until else streams.total((self.stream,))
        groups, rest = divmod(value.shape[1], self.entries)
        if rest or groups < 1 or total % groups:
            raise PlanError(f"dim 1 is not {self.entries} rows for each of some groups of {total} tokens")
        each = total // groups
        index = streams.mine((self.stream,))
        count = int((index < total).sum())
        start = int(index[0]) if count else 0
        first, last = start // each, (start + max(count, 1) - 1) // each + 1
        streams.notes[WholeGroups(self.stream)] = start - first * each, count, last * each - start - count
        return value[:, first * self.entries : last * self.entries]


@dataclass(frozen=True)
class WholeGroups:
    """This rank's tokens of `stream`, [B, S_r, D], padded to the groups of `OwnGroups`, which is cut before it: zeros
    replace other ranks' tokens of a group. An argument that is a number of tokens becomes the padded number."""

    stream: str

    def cut(self, value: Tensor | int, streams: Streams) -> Tensor | int:
        """Pads [B, S_r, D] to [B, G_r · tokens of a group, …]; tokens after the groups stay after them."""
        before, count, behind = streams.notes[self]
        if isinstance(value, int):
            return before + count + behind
        grouped, rest = value[:, :count], value[:, count:]
        return torch.cat([F.pad(grouped, (0, 0, before, behind)), rest], dim=1)

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Removes the padding."""
        before, count, behind = streams.notes[self]
        return torch.cat([value[:, before : before + count], value[:, before + count + behind :]], dim=1)


@dataclass(frozen=True)
class SampleLengths:
    """SeedVR2's number of tokens of each sample, attribute `name` of a dataclass: all samples are concatenated in
    `stream`."""

    name: str
    stream: str

    def cut(self, value: Any, streams: Streams) -> Any:
        """Replaces the numbers [B] by those of this rank's tokens, [B]."""
        lengths: Tensor = getattr(value, self.name)

        def own() -> Tensor:
            index = streams.mine((self.stream,), lengths.device)
            sample = torch.bucketize(index, lengths.cumsum(0), right=True)
            return torch.bincount(sample, minlength=len(lengths)).to(lengths)

        return replace(value, **{self.name: streams.once(self, lengths, own)})


@dataclass(frozen=True)
class Residuals:
    """A ControlNet's lists of tensors that are added to tokens, or one list. An item is cut when it is read, since
    lengths are known only then; tokens after those that it covers (references) get zeros."""

    rule: Tokens

    def cut(self, value: Mapping[str, Sequence[Any]] | Sequence[Any], streams: Streams) -> Any:
        """Returns the same lists, cut as they are read."""
        if not isinstance(value, Mapping):
            return _CutWhenRead(value, self.rule, streams)
        return {name: _CutWhenRead(items, self.rule, streams) for name, items in value.items()}


class _CutWhenRead(list[Any]):
    def __init__(self, items: Sequence[Any], rule: Tokens, streams: Streams):
        super().__init__(items)
        self._rule, self._streams = rule, streams

    def __getitem__(self, which: Any) -> Any:
        return self._cut(super().__getitem__(which))

    def pop(self, which: Any = -1) -> Any:
        return self._cut(super().pop(which))

    def _cut(self, residual: Any) -> Any:
        if not isinstance(residual, Tensor):
            return residual
        missing = self._streams.total(self._rule.streams) - residual.shape[1]
        if missing < 0:
            raise PlanError(f"a control residual of {residual.shape[1]} tokens, {-missing} more than {self._rule} has")
        return self._rule.cut(F.pad(residual, (0, 0, 0, missing)) if missing else residual, self._streams)


@dataclass(frozen=True)
class Trimmed:
    """A mask over the tokens of `streams`, additive or boolean, that excludes padding of `text`, one of them. The
    padding is dropped, and the mask with it. This rule must precede the one that would define the length of the text.

    Exact, since attention without a mask does not depend on the order of keys. A mask that weights tokens, differs
    within a batch or excludes other tokens stays a mask: whole, or cut where the model compares its length with the
    number of tokens.
    """

    BY_VALUE_ALONE: ClassVar = True
    """See `sites.by_value_alone`."""

    streams: Names
    text: str = "text"
    stays_whole: bool = True

    def cut(self, value: Tensor, streams: Streams) -> Tensor | None:
        """Returns None if only padding was masked; else the mask […, S], whole or cut to […, S_r]."""
        if streams.once(self, value, lambda: self._trims(value, streams)):
            return None
        return value if self.stays_whole else Tokens(self.streams, value.ndim - 1).cut(value, streams)

    def _trims(self, value: Tensor, streams: Streams) -> bool:
        rows = value.reshape(-1, value.shape[-1])
        seen = rows if value.dtype == torch.bool else rows == 0
        unseen = ~rows if value.dtype == torch.bool else rows < -1e4
        place = self.streams.index(self.text)
        before, behind = streams.total(self.streams[:place]), streams.total(self.streams[place + 1 :])
        length = value.shape[-1] - before - behind
        alike = ((seen | unseen) & (seen == seen[:1])).all()
        if length < 1 or not bool(alike & seen[0, :before].all() & seen[0, before + length :].all()):
            return False
        if self.text not in streams:
            kept = seen[0, before : before + length].nonzero().flatten()
            streams.define(self.text, length, None if len(kept) == length else kept)
        return True


@dataclass(frozen=True)
class Cropped:
    """A number: the model uses only that many tokens of a stream, whose length is that of the argument `of`. The other
    tokens are dropped. This rule must precede the one of that argument."""

    stream: str
    of: str

    def cut(self, value: int, streams: Streams) -> int:
        """Returns the number of tokens of the stream on this rank."""
        if self.stream not in streams:
            total = streams.given[self.of].shape[1]
            streams.define(self.stream, total, None if value >= total else torch.arange(value))
        return streams.local((self.stream,))


@dataclass(frozen=True)
class Behind:
    """A tensor that begins with this rank's tokens of `stream`, which the model will slice off by their number; `rule`
    applies to the rest."""

    stream: str
    rule: Tokens

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, T_r + S, …] to [B, T_r + S_r, …]."""
        here = streams.local((self.stream,))
        return torch.cat([value[:, :here], self.rule.cut(value[:, here:], streams)], dim=1)

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Joins [B, T_r + S_r, …] to [B, T_r + S, …]."""
        here = streams.local((self.stream,))
        return torch.cat([value[:, :here], self.rule.join(value[:, here:], streams)], dim=1)


@dataclass(frozen=True)
class BehindWhole:
    """A tensor that begins with tokens that every rank computes (they attend to none of the others); the argument `of`
    is their number. They form the stream `before`, of which only the keys are distributed over the ranks. `rule`
    applies to the rest."""

    before: str
    of: str
    rule: Tokens

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, P + S, …] to [B, P + S_r, …]."""
        count = streams.given[self.of]
        if self.before not in streams:
            streams.define(self.before, count)

        def own() -> Tensor:
            return torch.cat([value[:, :count], self.rule.cut(value[:, count:], streams)], dim=1)

        if self.rule.streams[0] in streams and value.shape[1] == count + streams.local(self.rule.streams):
            return value
        return streams.once(self, value, own)


@dataclass(frozen=True)
class Grid:
    """Tokens as a grid [B, frames, rows, columns, D]; a rank's tokens become as many frames of one token each."""

    stream: str

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        """Cuts [B, F, R, C, D] to [B, S_r, 1, 1, D]."""
        if value.shape[2:4] == (1, 1) and self.stream in streams:
            return value
        streams.notes["grid"] = value.shape[1:4]
        return Tokens((self.stream,)).cut(value.flatten(1, 3), streams)[:, :, None, None]

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Joins [B, S_r, 1, 1, D] to [B, F, R, C, D]."""
        return Tokens((self.stream,)).join(value.flatten(1, 3), streams).unflatten(1, streams.notes["grid"])


@dataclass(frozen=True)
class Segment:
    """A segment (start, stop, …) of the packed tokens of `streams`; joins the result of this segment, with tokens along
    dim 0."""

    name: str
    streams: Names

    def cut(self, value: Sequence[Any], streams: Streams) -> tuple[Any, ...]:
        """Converts the segment to this rank's tokens."""
        streams.notes[self.name] = value
        return range_of(value, self.streams, streams)

    def join(self, value: Tensor, streams: Streams) -> Tensor:
        """Joins [N_r, …] to [N, …]."""
        ranks = range(streams.ranks.size)
        ends = [range_of(streams.notes[self.name][:2], self.streams, streams, rank) for rank in ranks]
        mine = ends[streams.ranks.rank]
        assert value.shape[0] == mine[1] - mine[0]
        return streams.ranks.gather(value, 0, [stop - start for start, stop in ends])


@dataclass(frozen=True)
class Frames:
    """LTX-2's compressed modulation, one row for each frame: `data` [B, frames, …], `patches_per_frame`, `num_frames`.
    Some tokens of a rank's first and last frame may belong to other ranks."""

    stream: str

    def cut(self, value: Any, streams: Streams) -> Any:
        """Returns this rank's frames, which expand to exactly this rank's tokens."""
        if isinstance(value, Tensor):
            return Tokens((self.stream,)).cut(value, streams)
        if isinstance(value, _Window):
            return value
        each = value.patches_per_frame
        if value.num_frames * each == 1:
            return value
        index = streams.mine((self.stream,))
        first, last = int(index[0]) // each, int(index[-1]) // each + 1
        kind: Any = type(value)
        part = _windowed(kind)(value.data[:, first:last], each, per_frame=True)
        part.window = slice(int(index[0]) - first * each, int(index[-1]) + 1 - first * each)
        return part


class _Window:
    """Marker class of a compressed modulation that is already cut to this rank's frames."""

    window: slice


@cache
def _windowed(base: Any) -> Any:
    """Returns a subclass of `base`, since the model checks for its own class."""

    class Windowed(_Window, base):
        def expand(self) -> Tensor:
            return super().expand()[:, self.window]

        def expand_for_computation(self, *args: Any) -> Any:
            return tuple(x[:, self.window] for x in super().expand_for_computation(*args))

    return Windowed


@dataclass(frozen=True)
class Guides:
    """LTX-2's attenuated attention between the generated tokens and their guides (`noisy_mask`, `guide_start`,
    `tracked_count`, `tracked_mask`), as one additive mask over all tokens."""

    def cut(self, value: Any, streams: Streams) -> Any:
        """Returns the mask, [1, 1, S, S]."""
        if isinstance(value, Tensor):
            return value
        total, start = value.noisy_mask.shape[-1], value.guide_start
        stop = start + value.tracked_count
        mask = value.noisy_mask.expand(1, 1, total, total).clone()
        mask[:, :, start:stop] = value.tracked_mask
        mask[:, :, stop:] = 0
        return mask
