"""Latents and tokens: reading and writing only the part of a latent that a rank owns.

A latent [B, C, T, H, W] is a grid of patches; its tokens are the patches in (t, h, w) order. A contiguous range of
tokens is at most five boxes of that grid, so a rank touches its own part of the shared memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from einops import rearrange
from torch import Tensor

Grid = tuple[int, int, int]
"""Patches along time, height and width."""


def boxes(start: int, stop: int, grid: Grid) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts the token range [start, stop) into boxes of the grid, in token order."""
    _, height, width = grid
    while start < stop:
        t, rest = divmod(start, height * width)
        h, w = divmod(rest, width)
        if rest == 0 and stop - start >= height * width:  # whole frames
            count = (stop - start) // (height * width)
            yield slice(t, t + count), slice(0, height), slice(0, width)
            start += count * height * width
        elif w == 0 and stop - start >= width:  # whole rows of a frame
            count = min((stop - start) // width, height - h)
            yield slice(t, t + 1), slice(h, h + count), slice(0, width)
            start += count * width
        else:  # part of a row
            count = min(stop - start, width - w)
            yield slice(t, t + 1), slice(h, h + 1), slice(w, w + count)
            start += count


def _scale(box: tuple[slice, slice, slice], patch: Grid) -> tuple[slice, ...]:
    return tuple(slice(s.start * p, s.stop * p) for s, p in zip(box, patch, strict=True))


def read_tokens(x: Tensor, start: int, stop: int, patch: Grid, like: Tensor) -> Tensor:
    """Patches [start, stop) of x [B, C, T, H, W] as [B, stop − start, C·pt·ph·pw], with device and dtype of `like`."""
    grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))
    pt, ph, pw = patch
    parts = [x.new_empty(x.shape[0], 0, x.shape[1] * pt * ph * pw).to(like)]
    for box in boxes(start, stop, grid):  # type: ignore[arg-type]
        part = x[(slice(None), slice(None), *_scale(box, patch))].to(like)
        parts.append(rearrange(part, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw))
    return torch.cat(parts, dim=1)


def write_tokens(tokens: Tensor, out: Tensor, start: int, stop: int, patch: Grid) -> None:
    """Writes tokens [B, stop − start, C·pt·ph·pw] to their place in out [B, C, T, H, W].

    Where the size is no multiple of the patch, the last patches are cut off at the edge.
    """
    grid = tuple(-(-size // p) for size, p in zip(out.shape[2:], patch, strict=True))
    pt, ph, pw = patch
    done = 0
    for box in boxes(start, stop, grid):  # type: ignore[arg-type]
        t, h, w = (s.stop - s.start for s in box)
        count = prod((t, h, w))
        part = rearrange(
            tokens[:, done : done + count],
            "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
            t=t, h=h, w=w, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        place = out[(slice(None), slice(None), *_scale(box, patch))]
        place.copy_(part[:, :, : place.shape[2], : place.shape[3], : place.shape[4]])
        done += count
