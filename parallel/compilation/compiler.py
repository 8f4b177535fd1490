"""What compiles in one worker: PyTorch's compiler with a user's settings, its counts, and signs of life meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """Kinds of blocks that were to be compiled since the model was loaded; 0: none of its blocks can be."""
    failure: str = ""
    """Why blocks run as without compilation, if they do."""


class Compiler:
    """Compiles functions of one resident model on one rank, for one set of settings.

    A failure to compile, whatever its kind, is logged, and from then on all functions run as they are; only a new
    object tries again.

    Args:
        settings: the user's.
        sign_of_life: called about once a second during a compilation, from another thread.
    """

    def __init__(self, settings: CompileSettings, sign_of_life: Callable[[], None]):
        self.settings = settings
        self._sign_of_life = sign_of_life
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._graphs_of: dict[Any, int] = {}
        self._tally = Tally()
        self.failure = ""
        """Why nothing is compiled any more, if that is so."""
        try:
            self._options = _prepare(settings)
        except Exception as error:
            self.give_up(describe(error))

    def take_tally(self) -> Tally:
        """What has been done since the last time."""
        tally, self._tally = self._tally, Tally()
        tally.kinds, tally.failure = len(self._compiled), self.failure
        return tally

    def give_up(self, cause: str) -> None:
        """From here on nothing is compiled."""
        self.failure = cause
        log.warning("%s: the blocks run uncompiled: %s", self.settings.name, cause)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As one graph; it is compiled when it is called."""
        return torch.compile(function, fullgraph=True, dynamic=self.settings.dynamic, options=self._options)

    def _watched(self, kind: Any) -> _Watch:
        """Inside, what is compiled is for this kind of block."""
        return _Watch(self, kind)


class _Watch:
    """Counts and times what is compiled during one call of a block."""

    def __init__(self, owner: Compiler, kind: Any):
        self._owner, self._kind = owner, kind

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
        known = self._owner._graphs_of.get(self._kind, 0)
        self._owner._graphs_of[self._kind] = known + new
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
    # Attentions keep their order, which all ranks share; so may what lies between them.
    wanted = {"reorder_for_peak_memory": False}
    known = torch._inductor.list_options()
    return options | {name: value for name, value in wanted.items() if name in known}


def plain(argument: Any) -> Any:
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


def describe(error: BaseException) -> str:
    """Kind and first line of what went wrong; the compiler's messages go on for pages."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
