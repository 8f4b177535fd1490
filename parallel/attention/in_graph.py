"""Joint attention, exchange and all, as operators that a compiled block calls.

To the compiler an operator is opaque: it compiles what lies before and behind the attention, and the attention itself
runs as it does without compilation. So a block is one graph without a break, and every rank sends and receives the same
in the same order, whether its blocks are compiled or not. There are two operators, so that work can run between them
while tokens and heads are exchanged.

Imported only by workers that compile: an operator's name exists once in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .joint import JointAttention

T = TypeVar("T")


class Calls:
    """The attentions that the operators stand for while one block runs.

    Attributes:
        begun: the first one has started: other ranks are in it, so the block cannot be run again in another way.
    """

    def __init__(self, attentions: Sequence[JointAttention]):
        self.begun = False
        self._attentions = attentions
        self._finish: Callable[[], Tensor] | None = None

    def start(self, which: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        assert self._finish is None, "an attention starts before the one before it has finished"
        self.begun = True
        self._finish = self._attentions[which].start(q, k, v)

    def finish(self) -> Tensor:
        assert self._finish is not None
        finish, self._finish = self._finish, None
        return finish()


_calls: Calls | None = None
"""Of the block that runs now. An operator takes tensors and numbers only, and a number that changed from step to step
would be a reason to compile again."""


@contextmanager
def standing_for(attentions: Sequence[JointAttention]) -> Iterator[Calls]:
    """Inside, attention number i of a compiled block is `attentions[i]`."""
    global _calls
    before, _calls = _calls, Calls(attentions)
    try:
        yield _calls
    finally:
        _calls = before


@torch.library.custom_op("sequence_parallel::start_attention", mutates_args=())
def start_attention(q: Tensor, k: Tensor, v: Tensor, which: int) -> Tensor:
    """[B, S_r, H, D] ×3 → an empty tensor, by which the order of the two operators is known to the compiler."""
    assert _calls is not None
    _calls.start(which, q, k, v)
    return q.new_empty(0)


@torch.library.custom_op("sequence_parallel::finish_attention", mutates_args=())
def finish_attention(started: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """→ [B, S_r, H, D]. q, k and v are named again, so that the compiler keeps their memory until here."""
    assert _calls is not None
    return _calls.finish().contiguous()


@start_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, which: int) -> Tensor:
    return q.new_empty(0)


@finish_attention.register_fake
def _(started: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


class InGraph:
    """What a compiled block gets as its attention number `which`: a `JointAttention`, but for gradients."""

    def __init__(self, which: int):
        self._which = which

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return finish_attention(start_attention(q, k, v, self._which), q, k, v)

    def with_work(self, q: Tensor, k: Tensor, v: Tensor, work: Callable[[], T]) -> tuple[Tensor, T]:
        started = start_attention(q, k, v, self._which)
        result = work()
        return finish_attention(started, q, k, v), result
