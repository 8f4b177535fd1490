"""PyTorch's compiler in one worker: its options for a user's settings, its counts, and signs of life meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .folder import use_folder
from .settings import CompileSettings

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


class Compilations:
    """Follows the compilations of this process: their seconds, and a thread that gives signs of life during each.

    Attributes:
        give: called about once a second during a compilation, from another thread.
    """

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


compilations = Compilations()


def graphs_and_breaks() -> tuple[int, int]:
    """Of this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def prepare(settings: CompileSettings) -> dict[str, Any]:
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
    compilations.register()
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
