"""Latents and tokens: a rank reads and writes exactly its own part."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.adapters.patches import Grid, boxes, read_tokens, write_tokens

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@st.composite
def grids_and_ranges(draw: st.DrawFn) -> tuple[Grid, int, int]:
    grid = draw(GRIDS)
    total = grid[0] * grid[1] * grid[2]
    start = draw(st.integers(0, total))
    return grid, start, draw(st.integers(start, total))


def tokens_of(box: tuple[slice, slice, slice], grid: Grid) -> list[int]:
    """Indices of a box's tokens in (t, h, w) order."""
    _, height, width = grid
    return [
        (t * height + h) * width + w
        for t in range(box[0].start, box[0].stop)
        for h in range(box[1].start, box[1].stop)
        for w in range(box[2].start, box[2].stop)
    ]


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """All tokens of x as a convolution sees them: [B, N, C·pt·ph·pw]."""
    size = x.shape[1] * patch[0] * patch[1] * patch[2]
    weight = torch.eye(size, dtype=x.dtype).view(size, x.shape[1], *patch)
    return F.conv3d(x, weight, stride=patch).flatten(2).transpose(1, 2)


@given(grids_and_ranges())
def test_boxes_cover_each_token_once_and_in_order(case: tuple[Grid, int, int]):
    grid, start, stop = case
    cut = list(boxes(start, stop, grid))
    assert [i for box in cut for i in tokens_of(box, grid)] == list(range(start, stop))
    assert len(cut) <= 5
    for box in cut:
        assert all(0 <= part.start < part.stop <= size for part, size in zip(box, grid, strict=True))


@given(grids_and_ranges(), st.integers(1, 2), st.integers(1, 3), st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 1)]))
def test_reading_equals_a_convolution(case: tuple[Grid, int, int], batch: int, channels: int, patch: Grid):
    grid, start, stop = case
    shape = (batch, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    assert torch.equal(read_tokens(x, start, stop, patch, like=x), patchify(x, patch)[:, start:stop])


@given(grids_and_ranges(), st.integers(1, 2), st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 3)]))
def test_writing_is_the_inverse_and_leaves_the_rest_alone(case: tuple[Grid, int, int], batch: int, patch: Grid):
    grid, start, stop = case
    shape = (batch, 2, *(g * p for g, p in zip(grid, patch, strict=True)))
    x = 1 + torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    out = torch.zeros(shape, dtype=torch.float64)
    write_tokens(patchify(x, patch)[:, start:stop], out, start, stop, patch)
    written = patchify(out, patch)
    assert torch.equal(written[:, start:stop], patchify(x, patch)[:, start:stop])
    assert not written[:, :start].any()
    assert not written[:, stop:].any()


@given(GRIDS, st.lists(st.integers(0, 125), max_size=4))
def test_all_ranks_together_write_the_whole_latent(grid: Grid, cuts: list[int]):
    patch, total = (1, 2, 2), grid[0] * grid[1] * grid[2]
    x = torch.randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])
    out = torch.full_like(x, float("nan"))
    ends = [0, *sorted(min(cut, total) for cut in cuts), total]
    for start, stop in pairwise(ends):
        write_tokens(read_tokens(x, start, stop, patch, like=x), out, start, stop, patch)
    assert torch.equal(out, x)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_patches_are_cut_off_at_the_edge(frames: int, height: int, width: int):
    """FLUX takes odd sizes, padded to whole patches on the way in."""
    patch = (1, 2, 2)
    padded = torch.randn(2, 3, frames, height + height % 2, width + width % 2)
    tokens = patchify(padded, patch)
    out = torch.zeros(2, 3, frames, height, width)
    middle = tokens.shape[1] // 2
    write_tokens(tokens[:, :middle], out, 0, middle, patch)
    write_tokens(tokens[:, middle:], out, middle, tokens.shape[1], patch)
    assert torch.equal(out, padded[..., :height, :width])


def test_reading_converts_to_the_weights_dtype():
    read = read_tokens(torch.ones(1, 1, 1, 2, 4), 0, 2, (1, 2, 2), like=torch.zeros(1, dtype=torch.bfloat16))
    assert (read.dtype, read.shape) == (torch.bfloat16, (1, 2, 4))
    empty = read_tokens(torch.ones(3, 1, 1, 2, 4), 1, 1, (1, 2, 2), like=read)
    assert (empty.dtype, empty.shape) == (torch.bfloat16, (3, 0, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writing_converts_to_the_latents_dtype(dtype: torch.dtype):
    out = torch.zeros(1, 1, 1, 2, 4, dtype=dtype)
    write_tokens(torch.ones(1, 2, 4), out, 0, 2, (1, 2, 2))
    assert (out == 1).all()
