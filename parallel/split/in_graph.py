"""Attention of a split network as one operator, which a compiled block calls.

The operator is opaque to the compiler: it compiles the code before and after the attention, and the attention itself,
including its exchange, runs as it does without compilation, whichever function computes it. So a block is one graph
without a break, and every rank sends and receives the same in the same order, whether its blocks are compiled or not.

All blocks of a kind share one graph, which therefore contains only the number of the attention's site in the block,
and how the model called its attention. Everything else is looked up in the arguments of the block that runs now.

Imported only by workers that compile: an operator's name exists once in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .routes import OVERRIDE, OverrideInGraph, Route, options_of

How = tuple[Callable[..., Tensor], tuple[tuple[str, Any], ...]]
"""The model's attention function, and its keyword arguments other than tensors: scale, precision."""


class Calls:
    """Attention calls of one block while it runs.

    Args:
        routes: routes of the block's sites; None where nothing is exchanged.
        options: the `transformer_options` that the block received.

    Attributes:
        begun: True once an attention has started: other ranks are in it, so the block cannot be run again in another
            way.
    """

    def __init__(self, routes: Sequence[Route | None], options: Mapping[str, Any]):
        self.begun = False
        self._routes, self._options = routes, options

    def expect(self, site: int) -> None:
        """Records that a routed module has begun and will not attend in this block; see `Route.expect`."""
        if (route := self._route(site)) is not None:
            route.expect()

    def attend(self, site: int, how: How, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attends as without compilation: q [B, H, Q_r, D], k and v [B, G, K_r, D] → [B, Q_r, H, D]."""
        self.begun = True
        function, named = how
        options = options_of(self._options, self._route(site))
        arguments = {**dict(named), "mask": mask, "skip_reshape": True, "skip_output_reshape": True}
        arguments["transformer_options"] = options
        override = options.get(OVERRIDE)
        out = (
            function(q, k, v, q.shape[1], **arguments)
            if override is None
            else override(function, q, k, v, q.shape[1], **arguments)
        )
        return out.transpose(1, 2).to(q.dtype).contiguous()

    def _route(self, site: int) -> Route | None:
        route = self._routes[site]
        return None if route is None or route.alone else route


_calls: Calls | None = None
"""Calls of the block that runs now. An operator takes only tensors and numbers, and an object that changed from block
to block would cause a recompilation."""


@contextmanager
def running(calls: Calls) -> Iterator[None]:
    """Makes the operators use these calls within the context."""
    global _calls
    before, _calls = _calls, calls
    try:
        yield
    finally:
        _calls = before


@torch.library.custom_op("sequence_parallel::attend", mutates_args=("order",))
def attend(order: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: int, how: int) -> Tensor:
    """Attends: q [B, H, Q_r, D], k and v [B, G, K_r, D] → [B, Q_r, H, D].

    `order` is never read or written: all attentions are declared to mutate it, so the compiler keeps their order, also
    of those that do not depend on each other (video and audio). Ranks that exchanged in different orders would hang.
    """
    assert _calls is not None
    return _calls.attend(site, _hows[how], q, k, v, mask)


@attend.register_fake
def _(order: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: int, how: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("sequence_parallel::expect", mutates_args=("order",))
def expect(order: Tensor, site: int) -> None:
    """Records that a routed module has begun and does not attend in this block."""
    assert _calls is not None
    _calls.expect(site)


@expect.register_fake
def _(order: Tensor, site: int) -> None:
    return None


_hows: list[How] = []


@torch.compiler.assume_constant_result
def _number(function: Callable[..., Tensor], named: tuple[tuple[str, Any], ...]) -> int:
    """Returns the number of a way of calling attention, which is a constant of the graph."""
    how = (function, named)
    if how not in _hows:
        _hows.append(how)
    return _hows.index(how)


class InGraph(OverrideInGraph):
    """ComfyUI's attention override inside a compiled block. One object serves all blocks, or each would be compiled.

    Args:
        device: device of the blocks.
    """

    def __init__(self, device: torch.device):
        self._site = 0
        self._attended = False
        self._order = torch.zeros(1, device=device)

    def enter(self, site: int) -> None:
        """Marks the start of a module with a site of its own."""
        self._site, self._attended = site, False

    def leave(self) -> None:
        """Marks its end. Such modules are never nested."""
        if not self._attended:
            expect(self._order, self._site)
        self._site = 0

    def attend_by(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        named: dict[str, Any],
    ) -> Tensor:
        named.pop("transformer_options", None)
        how = _number(function, tuple(sorted(named.items())))
        self._attended = True
        return attend(self._order, q, k, v, mask, self._site, how).transpose(1, 2)
