"""Skipped blocks, which return their inputs, while their hooks still run.

Hooks that cut arguments and join results are needed; the others check `streams.Streams.skipping`. The network's own
code between the blocks (ControlNet's residuals, concatenations) finds tensors of the right shapes.
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
"""Function that ComfyUI's networks call instead of a block: with the block's arguments, and a dict that holds a
function that runs the block."""


@contextmanager
def replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Replaces `module.forward` within the context, then restores the previous one: the class's or the instance's
    own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def argument_names(module: nn.Module, positional: str = "") -> list[str]:
    """Returns the names of the arguments of the module's `forward`, or those in `positional`, which its plan
    defines."""
    return positional.split() or list(inspect.signature(type(module).forward).parameters)[1:]


def handing_on(split: Split, original: Forward, names: Sequence[str], returned: Sequence[str]) -> Forward:
    """Returns a `forward` that, while blocks are skipped, returns arguments instead of its results.

    Args:
        split: its streams say whether blocks are skipped.
        original: called when they are not.
        names: names of its arguments, in their order.
        returned: names of the arguments that are returned as results.
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
    """Makes ComfyUI's network skip, within the context, the blocks instead of which it calls the yielded function.

    Args:
        plan: plan of the network's class; with an empty one no hook needs the blocks to run.
        returned: list of blocks → arguments that are returned as a block's results.
        split: the split that installed `plan` in the network.
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
