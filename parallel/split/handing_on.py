"""Blocks that hand on what comes in: skipped ones, whose hooks run all the same.

Hooks that cut arguments and join results are needed, others ask `streams.Streams.skipping`; the network's own code
between the blocks (ControlNet's residuals, concatenations) finds tensors of the right shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .hooks import Split
from .sites import Plan

Forward = Callable[..., Any]
Replace = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""What ComfyUI's networks call in a block's place: with its arguments, and a function that runs it."""


@contextmanager
def replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """`module.forward` is another function, until it is what it was: of its class, or of the instance."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def argument_names(module: nn.Module, positional: str = "") -> list[str]:
    """Of its forward, or those that its plan gives them."""
    return positional.split() or list(inspect.signature(type(module).forward).parameters)[1:]


def handing_on(split: Split, original: Forward, names: Sequence[str], returned: Sequence[str]) -> Forward:
    """A forward that, while blocks are skipped, returns arguments in the place of its results.

    Args:
        split: says whether they are.
        original: runs otherwise.
        names: of its arguments, in their order.
        returned: those that stand for its results.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not split.streams.skipping:
            return original(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        results = tuple(given[name] for name in returned)
        return results if len(results) > 1 else results[0]

    return forward


@contextmanager
def skippable(network: nn.Module, plan: Plan, returned: Mapping[str, str], split: Split) -> Iterator[Replace]:
    """While this lasts, ComfyUI's network skips the blocks in whose place it calls what this yields.

    Args:
        plan: of its class; with an empty one no hook misses a block.
        returned: list of blocks → arguments that stand for a block's results.
        split: by which `plan` is in the network.
    """

    def skip(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if not plan:
            return args
        split.streams.skipping = True
        try:
            result: dict[str, Any] = extra["original_block"](args)
            return result
        finally:
            split.streams.skipping = False

    with ExitStack() as during:
        for path, arguments in returned.items() if plan else ():
            for block in network.get_submodule(path).children():
                names = argument_names(block, plan[path].positional)
                during.enter_context(replaced(block, handing_on(split, block.forward, names, arguments.split())))
        yield skip
