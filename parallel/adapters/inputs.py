"""Checks of a step's inputs, samples with equal texts, and random inputs, as several families need them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError


def require_known(family: str, inputs: Mapping[str, Tensor], known: Collection[str], needed: Collection[str]) -> None:
    """Refuses an input whose meaning the family does not know, and the lack of one of the text encoder's.

    Raises:
        UnsupportedError: naming it.
    """
    if unknown := sorted(set(inputs) - {"x", "timestep", *known, *needed}):
        raise UnsupportedError(f"{family} (SP) cannot use the input {', '.join(unknown)} yet")
    for name in needed:
        if name not in inputs:
            raise UnsupportedError(f"{family} needs its text encoder's conditioning; this one has no {name}")


def require_latent(family: str, x: Tensor, channels: int, multiples: Sequence[int] = (1, 1, 1)) -> None:
    """Refuses a latent that is not [batch, channels, frames, height, width], or no multiple of these sizes.

    Raises:
        UnsupportedError: naming the size.
    """
    if x.ndim != 5 or x.shape[1] != channels:
        raise UnsupportedError(
            f"{family} needs a latent of shape [batch, {channels}, frames, height, width]; it is {list(x.shape)}"
        )
    for axis, size, step in zip(("frames", "height", "width"), x.shape[2:], multiples, strict=True):
        if size % step:
            raise UnsupportedError(f"latent {axis} is {size}; {family} needs a multiple of {step}")


def require_text(inputs: Mapping[str, Tensor], width: int, encoder: str) -> None:
    """Refuses a text of another width, and a mask that does not say of each of its tokens whether it counts.

    Raises:
        UnsupportedError: naming the shapes.
    """
    context, mask = inputs["context"], inputs.get("attention_mask")
    if context.ndim != 3 or context.shape[2] != width:
        raise UnsupportedError(
            f"the text conditioning has the shape {list(context.shape)}; this checkpoint needs"
            f" [batch, tokens, {width}]: is it from {encoder}?"
        )
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != context.shape[1] or mask.is_floating_point()):
        raise UnsupportedError(
            f"attention_mask is {mask.dtype} of shape {list(mask.shape)}; needed is a whole number, 0 or 1, for each"
            f" of the {context.shape[1]} text tokens"
        )
    if mask is not None and not mask.any(dim=1).all():
        raise UnsupportedError("attention_mask leaves none of a sample's text tokens; at least one must be 1")


def require_one_time_each(family: str, timestep: Tensor) -> None:
    """Refuses timesteps per frame or per token.

    Raises:
        UnsupportedError: naming the shape.
    """
    if timestep.ndim != 1:
        raise UnsupportedError(f"{family} needs one timestep per sample; got {list(timestep.shape)}")


def alike(text: Tensor, mask: Tensor | None) -> list[tuple[slice, Tensor]]:
    """Which samples can run together, none attending to padding: all, if their masks are equal, else each by itself.

    Args:
        text: [B, L, C].
        mask: [B, L] or [1, L], not 0 for tokens that count; None counts all.

    Returns:
        (samples, [L] bool of the tokens to keep) for each group.
    """
    valid = text.new_ones(1, text.shape[1], dtype=torch.bool) if mask is None else mask != 0
    valid = valid.expand(len(text), -1)
    if (valid == valid[:1]).all():
        return [(slice(None), valid[0])]
    return [(slice(i, i + 1), keep) for i, keep in enumerate(valid)]


def normal(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes tensors of the given sizes, normally distributed, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)
