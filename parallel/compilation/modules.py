"""Compiles the repeated blocks of a network under a split plan: all blocks of a class share one graph.

Each rank compiles on its own, and may fall back to uncompiled blocks on its own. The ranks need no agreement: attention
is one opaque operator to the compiler (`split.in_graph`), so the ranks exchange the same data in the same order with
and without compiled blocks. Splitting, joining, cancelling and caching wrap the blocks and are not compiled.

A compiled block is compared with the uncompiled one before it is used. The first time that a class of block receives
inputs with a new signature, the block runs uncompiled, together with the other ranks, and this result is used. Then the
compiled block runs on copies of the same inputs, with the recorded attention results, so no other rank takes part; its
attention inputs and its result must agree within rounding. So a compilation that fails has no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..split.hooks import Block
from ..split.in_graph import Calls, InGraph, running
from ..split.routes import OPTIONS, OVERRIDE, place_of_options
from .compiler import Tally, compilations, describe, graphs_and_breaks, plain, prepare
from .replay import Recorded, Replayed, difference
from .settings import CompileSettings

log = logging.getLogger("sequence_parallel")

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
"""Maximum ‖compiled − uncompiled‖ / ‖uncompiled‖ of a block, by dtype. The compiler keeps intermediates in fp32 that
eager operators round each time: a dozen roundings of half an ulp (2^-9 in bfloat16) stay below it; a wrong formula does
not."""
ALLOWED_QUANTIZED = 0.2
"""Limit used instead if activations are rounded to 4 or 8 bits, or products to TF32: a value that is rounded the other
way is off by a whole step of the format."""


class CompiledModules:
    """The compiler of a split network's blocks on one rank, for one set of settings; active within `on`.

    A failure to compile, whatever its kind, is logged, and from then on all blocks run uncompiled; only a new object
    tries again.

    Args:
        settings: the user's settings.
        sign_of_life: heartbeat callback, called about once a second during a compilation, from another thread.
        device: device of the blocks.
    """

    def __init__(self, settings: CompileSettings, sign_of_life: Callable[[], None], device: torch.device):
        self._settings, self._sign_of_life = settings, sign_of_life
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._graphs_of: dict[Any, int] = {}
        self._compared: set[Any] = set()
        self._tally = Tally()
        self._override = InGraph(device)
        self.failure = ""
        """Reason why nothing is compiled any more; empty while blocks are compiled."""
        try:
            self._options = prepare(settings)
        except Exception as error:
            self._failed(error)

    def take_tally(self) -> Tally:
        """Returns the counters since the last call and resets them."""
        tally, self._tally = self._tally, Tally()
        tally.kinds, tally.failure = len(self._compiled), self.failure
        return tally

    @contextmanager
    def on(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Runs these blocks compiled within the context. It replaces their `forward`, so hooks are not compiled, and a
        later replacement of `forward` (by a cache) is not either."""
        replaced: list[nn.Module] = []
        try:
            for block in blocks if not self.failure else ():
                assert "forward" not in vars(block.module), "compiled blocks go inside of what else replaces them"
                block.module.forward = partial(self._run, block)
                replaced.append(block.module)
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)

    def _run(self, block: Block, /, *args: Any, **kwargs: Any) -> Any:
        """Runs a block's forward, compiled where possible."""
        kind: Any = type(block.module)
        call = _Call.of(block.module, args, kwargs)
        if self.failure or call is None:
            return kind.forward(block.module, *args, **kwargs)
        compiled = self._kind(kind)
        signature = (kind, call.signature(self._settings.dynamic))
        if signature not in self._compared:
            self._compared.add(signature)
            return self._compare(block, compiled, call)
        calls = Calls(block.routes, call.options)
        try:
            with running(calls), self._watched(kind):
                return self._with_override(compiled, block.module, call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if calls.begun:  # other ranks take part in this attention already
                raise
            self._failed(error)
        return kind.forward(block.module, *args, **kwargs)

    def _kind(self, kind: Any) -> Callable[..., Any]:
        """Returns the compiled forward of a class of block; it is compiled as one graph at its first call."""
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(
                kind.forward, fullgraph=True, dynamic=self._settings.dynamic, options=self._options
            )
        return self._compiled[kind]

    @contextmanager
    def _watched(self, kind: Any) -> Iterator[None]:
        """Counts and times the compilations within the context, for this class of block."""
        compilations.give = self._sign_of_life
        seconds, (graphs, breaks) = compilations.seconds, graphs_and_breaks()
        try:
            yield
        finally:
            if compilations.seconds != seconds:
                graphs, breaks = (now - then for now, then in zip(graphs_and_breaks(), (graphs, breaks), strict=True))
                known = self._graphs_of.get(kind, 0)
                self._graphs_of[kind] = known + graphs
                self._tally.seconds += compilations.seconds - seconds
                self._tally.graphs += graphs
                self._tally.breaks += breaks
                self._tally.recompilations += graphs if known else max(0, graphs - 1)

    def _compare(self, block: Block, compiled: Callable[..., Any], call: _Call) -> Any:
        """Runs the block uncompiled, then compiled on copies, and compares them. Returns the uncompiled result."""
        kind: Any = type(block.module)
        copies = call.mapped(torch.clone)  # blocks may work in place
        recorded = Recorded(block.routes, call.options)
        with running(recorded):
            result = self._with_override(kind.forward, block.module, call)
        replayed = Replayed(recorded)
        try:
            with running(replayed), self._watched(kind):
                other = self._with_override(compiled, block.module, copies)
            replayed.end()
            self._judge(block.module, result, other, replayed.differences)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed(error)
        return result

    def _judge(self, module: nn.Module, result: Any, other: Any, differences: Sequence[tuple[str, float]]) -> None:
        """Compares a compiled block's result and attention inputs with the uncompiled block's.

        Raises:
            TypeError: the results differ in shape or dtype.
            ValueError: the results or attention inputs differ by more than is allowed.
        """
        expected, found = _tensors(result), _tensors(other)
        if [(x.shape, x.dtype) for x in expected] != [(x.shape, x.dtype) for x in found]:
            raise TypeError(f"compiled, {type(module).__name__} returns other shapes or dtypes")
        results = [("its result", difference(x, y)) for x, y in zip(found, expected, strict=True)]
        where, worst = max([*differences, *results], key=lambda named: _size(named[1]), default=("", 0.0))
        allowed = allowed_difference(module, expected)
        log.info("%s: compiled, %s of %s differs by %.1g (relative; allowed %.1g)", self._settings.name, where,
                 type(module).__name__, worst, allowed)  # fmt: skip
        if not worst <= allowed:
            raise ValueError(
                f"compiled, {where} of {type(module).__name__} differs by {worst:.2g} (relative; allowed {allowed:.2g})"
                " from the uncompiled one's"
            )

    def _with_override(self, function: Callable[..., Any], module: nn.Module, call: _Call) -> Any:
        self._override.enter(0)
        return call.run(function, module, self._override)

    def _failed(self, error: Exception) -> None:
        """Logs the error and stops compiling from now on."""
        self.failure = describe(error)
        log.info("%s: the compiler failed", self._settings.name, exc_info=True)
        log.warning("%s: the blocks run uncompiled: %s", self._settings.name, self.failure)


@dataclass(slots=True)
class _Call:
    """Arguments of a block's call, with its `transformer_options` kept apart."""

    args: tuple[Any, ...]
    """Positional arguments, with None in place of the options if these are positional."""
    kwargs: dict[str, Any]
    options: Mapping[str, Any]
    """The call's `transformer_options`."""
    place: int
    """Index of the options in `args`, or an index past its end."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """Returns the call; None if it has no options, without which attention cannot be put into a graph."""
        place, options = place_of_options(module), kwargs.get(OPTIONS)
        if place < len(args):
            options, args = args[place], (*args[:place], None, *args[place + 1 :])
        kwargs = {name: value for name, value in kwargs.items() if name != OPTIONS}
        return cls(args, kwargs, options, place) if isinstance(options, Mapping) else None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> _Call:
        """Returns the call with each tensor replaced by `change(tensor)`."""
        kwargs = {name: _mapped(value, change) for name, value in self.kwargs.items()}
        return replace(self, args=_mapped(self.args, change), kwargs=kwargs)

    def run(self, function: Callable[..., Any], module: nn.Module, override: Any) -> Any:
        """Calls a block's function with this override of attention."""
        options, made = {**self.options, OVERRIDE: override}, self.mapped(plain)
        if self.place < len(made.args):
            return function(module, *made.args[: self.place], options, *made.args[self.place + 1 :], **made.kwargs)
        return function(module, *made.args, **made.kwargs, **{OPTIONS: options})

    def signature(self, dynamic: bool) -> Any:
        """Returns the properties that a graph is specialised for; for dynamic sizes, only 0, 1 or more."""
        args = (*self.args[: self.place], *self.args[self.place + 1 :])
        return _signature([args, sorted(self.kwargs.items())], dynamic)


def allowed_difference(module: nn.Module, results: Sequence[Tensor]) -> float:
    """Returns the maximum relative difference between a block's compiled and uncompiled results."""
    quantized = any(hasattr(parameter, "__tensor_flatten__") for parameter in module.parameters())
    rounded = any(x.is_cuda for x in results) and torch.backends.cuda.matmul.allow_tf32
    if quantized or rounded:
        return ALLOWED_QUANTIZED
    return max((ALLOWED[x.dtype] for x in results if x.dtype in ALLOWED), default=0.0)


def _size(value: float) -> float:
    """Maps NaN to infinity, so that it compares as larger than any number."""
    return value if value == value else float("inf")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Maps the tensors in nested tuples and lists. `tree_map` takes six times as long, at each block."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _signature(value: Any, dynamic: bool) -> Any:
    if isinstance(value, Tensor):
        sizes = tuple(min(size, 2) for size in value.shape) if dynamic else tuple(value.shape)
        return value.dtype, value.device, sizes
    if isinstance(value, tuple | list):
        return tuple(_signature(item, dynamic) for item in value)
    return value if value is None or isinstance(value, bool | str) else type(value)
