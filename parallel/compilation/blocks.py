"""Compiles the repeated blocks of an adapter's network in one worker: one graph for each kind of block, which they all
share.

Each rank compiles on its own, and may fall back on its own. Nothing needs to be agreed: what the ranks exchange, and in
which order, is the same with compiled blocks and without (`attention.in_graph`), and what decides anything for all of
them (Cancel, caches) lies between the blocks. A rank that compiles for minutes keeps its peers waiting in an exchange,
so it gives signs of life meanwhile.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..attention.joint import JointAttention
from ..degrees import Degrees
from .compiler import Compiler, describe, plain
from .settings import CompileSettings

log = logging.getLogger("sequence_parallel")


class CompiledBlocks(Compiler):
    """Called with the function of a kind of block, it returns the compiled one, see `StepContext.block`."""

    def __init__(self, settings: CompileSettings, sign_of_life: Callable[[], None]):
        super().__init__(settings, sign_of_life)
        self.checked: set[Degrees] = set()
        """Splits under which compiled and uncompiled blocks have been compared."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = self._wrap(function)
        return self._compiled[function]

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.failure:
            return function
        from ..attention import in_graph

        compiled = self._compile(function)
        stands_in = [in_graph.InGraph(0)]  # the same objects at every call, or it would be compiled again

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            if self.failure:
                return function(*arguments)
            attentions = [argument for argument in arguments if isinstance(argument, JointAttention)]
            while len(stands_in) < len(attentions):
                stands_in.append(in_graph.InGraph(len(stands_in)))
            replacements = iter(stands_in)
            replaced = [
                next(replacements) if isinstance(argument, JointAttention) else plain(argument)
                for argument in arguments
            ]
            with in_graph.standing_for(attentions) as calls:
                try:
                    with self._watched(function):
                        return compiled(*replaced)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    if calls.begun:  # peers are in this attention
                        raise
                    log.info("%s: the compiler failed", self.settings.name, exc_info=True)
                    self.give_up(describe(error))
            return function(*arguments)

        return run
