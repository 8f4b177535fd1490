"""Compiles the repeated blocks of a network in one worker: one graph for each kind of block, which they all share.

Each rank compiles on its own, and may fall back on its own. Nothing needs to be agreed: what the ranks exchange, and in
which order, is the same with compiled blocks and without (`attention.in_graph`), and what decides anything for all of
them (Cancel, caches) lies between the blocks. A rank that compiles for minutes keeps its peers waiting in an exchange,
so it gives signs of life meanwhile.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.joint import JointAttention
from ..degrees import Degrees
from .folder import use_folder
from .settings import CompileSettings

log = logging.getLogger("sequence_parallel")

_SIGN_S = 1.0
_LONGEST_S = 1800.0
"""A single compilation that takes longer gives no more signs of life: it hangs."""
_VARIANTS = 64
"""Graphs of one kind of block, of all models in this process: with text and without, batch sizes, sizes if not dynamic.
PyTorch's own limit is 8."""


@dataclass(slots=True)
class Tally:
    """What one rank's compiler has done since it was last asked."""

    seconds: float = 0.0
    """In compilation."""
    graphs: int = 0
    breaks: int = 0
    """Places where Python ran between two graphs of a block."""
    recompilations: int = 0
    """Graphs beyond the first one of each kind of block."""
    kinds: int = 0
    """Kinds of blocks that the family has handed over since the model was loaded; 0: its adapter hands over none."""
    failure: str = ""
    """Why blocks run as without compilation, if they do."""


class CompiledBlocks:
    """The compiler of one resident model on one rank, for one set of settings. Called with the function of a kind of
    block, it returns the compiled one, see `StepContext.block`.

    A failure to compile, whatever its kind, is logged, and from then on all functions run as they are; only a new
    object tries again.

    Args:
        settings: the user's.
        sign_of_life: called about once a second during a compilation, from another thread.
    """

    def __init__(self, settings: CompileSettings, sign_of_life: Callable[[], None]):
        self._settings = settings
        self._sign_of_life = sign_of_life
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._graphs_of: dict[Callable[..., Any], int] = {}
        self._tally = Tally()
        self.failure = ""
        """Why nothing is compiled any more, if that is so."""
        self.checked: set[Degrees] = set()
        """Splits under which compiled and uncompiled blocks have been compared."""
        try:
            self._options = _prepare(settings)
        except Exception as error:
            self.give_up(_describe(error))

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            self._compiled[function] = self._wrap(function)
        return self._compiled[function]

    def take_tally(self) -> Tally:
        """What has been done since the last time."""
        tally, self._tally = self._tally, Tally()
        tally.kinds, tally.failure = len(self._compiled), self.failure
        return tally

    def give_up(self, cause: str) -> None:
        """From here on nothing is compiled."""
        self.failure = cause
        log.warning("%s: the blocks run uncompiled: %s", self._settings.name, cause)

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.failure:
            return function
        from ..attention import in_graph

        compiled = torch.compile(function, fullgraph=True, dynamic=self._settings.dynamic, options=self._options)
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
                next(replacements) if isinstance(argument, JointAttention) else _plain(argument)
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
                    log.info("%s: the compiler failed", self._settings.name, exc_info=True)
                    self.give_up(_describe(error))
            return function(*arguments)

        return run

    def _watched(self, function: Callable[..., Any]) -> _Watch:
        return _Watch(self, function)


class _Watch:
    """Counts and times what is compiled during one call of a block."""

    def __init__(self, owner: CompiledBlocks, function: Callable[..., Any]):
        self._owner, self._function = owner, function

    def __enter__(self) -> None:
        from torch._dynamo.utils import counters

        _signs.give = self._owner._sign_of_life
        self._counters = counters
        self._seconds = _signs.seconds
        self._before = self._count()

    def __exit__(self, *_: object) -> None:
        if _signs.seconds == self._seconds:
            return
        (graphs, breaks), tally = self._count(), self._owner._tally
        new = graphs - self._before[0]
        known = self._owner._graphs_of.get(self._function, 0)
        self._owner._graphs_of[self._function] = known + new
        tally.seconds += _signs.seconds - self._seconds
        tally.graphs += new
        tally.breaks += breaks - self._before[1]
        tally.recompilations += new if known else max(0, new - 1)

    def _count(self) -> tuple[int, int]:
        return self._counters["stats"]["unique_graphs"], sum(self._counters["graph_break"].values())


class _SignsOfLife:
    """Follows the compilations of this process: their seconds, and a thread that gives signs of life during each."""

    def __init__(self) -> None:
        self.give: Callable[[], None] = lambda: None
        self.seconds = 0.0
        self._began = 0.0
        self._over = threading.Event()

    def register(self) -> None:
        from torch._dynamo.callback import callback_handler

        if self._start not in callback_handler.start_callbacks:  # `torch.compiler.reset` takes them away
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, *_: Any) -> None:
        self._began, self._over = time.perf_counter(), threading.Event()
        threading.Thread(target=self._run, args=(self._over, self.give), name="compiling", daemon=True).start()

    def _end(self, *_: Any) -> None:
        self._over.set()
        self.seconds += time.perf_counter() - self._began

    @staticmethod
    def _run(over: threading.Event, give: Callable[[], None]) -> None:
        last = time.monotonic() + _LONGEST_S
        while not over.wait(_SIGN_S) and time.monotonic() < last:
            give()


_signs = _SignsOfLife()


def _prepare(settings: CompileSettings) -> dict[str, Any]:
    """The compiler's options.

    Raises:
        Exception: of any kind, where this PyTorch cannot compile.
    """
    use_folder()
    import torch._dynamo
    import torch._inductor
    import torch.fx.experimental._config

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    # Sizes that happen to be equal at first (of text and picture, say) are not taken to be always.
    torch.fx.experimental._config.use_duck_shape = False
    _signs.register()
    options = dict(torch._inductor.list_mode_options(settings.mode))
    # What runs between the two operators of an attention is to stay there, where it hides the exchange.
    wanted = {"reorder_for_peak_memory": False}
    known = torch._inductor.list_options()
    return options | {name: value for name, value in wanted.items() if name in known}


def _plain(argument: Any) -> Any:
    """A tensor that is a view, as one that is none, and one that lies in order with the strides that say so.

    The compiler looks at what a view is a view of, and at the stride of a dimension of size 1; of the first block's
    input, and of a compiled block's result, they often differ from the other blocks'.
    """
    if not isinstance(argument, Tensor):
        return argument
    if argument.is_contiguous() and argument.stride() != (strides := _strides(argument.shape)):
        argument = argument.as_strided(argument.shape, strides)
    return argument.data if argument._is_view() else argument


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a tensor of this shape without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def _describe(error: BaseException) -> str:
    """Kind and first line of what went wrong; the compiler's messages go on for pages."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
