"""PyTorch's compiler in one worker: its options for the user's settings, its counters, and heartbeats while it runs."""

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
"""Maximum seconds of heartbeats for a single compilation; one that takes longer is considered hung."""
_VARIANTS = 64
"""Maximum number of graphs for one class of block, over all models in this process: with and without text, batch sizes,
and, if not dynamic, sizes. PyTorch's own limit is 8."""


@dataclass(slots=True)
class Tally:
    """Counters of one rank's compiler since the last query."""

    seconds: float = 0.0
    """Seconds spent compiling."""
    graphs: int = 0
    breaks: int = 0
    """Places where Python ran between two graphs of a block."""
    recompilations: int = 0
    """Graphs beyond the first one of each class of block."""
    kinds: int = 0
    """Block classes submitted for compilation since the model was loaded; 0: none of the blocks can be compiled."""
    failure: str = ""
    """Reason why the blocks run uncompiled; empty if they do not."""


class Compilations:
    """Tracks the compilations of this process: records their seconds, and runs a heartbeat thread during each.

    Attributes:
        give: heartbeat callback, called about once a second during a compilation, from another thread.
    """

    def __init__(self) -> None:
        self.give: Callable[[], None] = lambda: None
        self.seconds = 0.0
        self._began = 0.0
        self._over = threading.Event()

    def register(self) -> None:
        from torch._dynamo.callback import callback_handler

        if self._start not in callback_handler.start_callbacks:  # `torch.compiler.reset` removes them
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
    """Returns the numbers of graphs and of graph breaks in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def prepare(settings: CompileSettings) -> dict[str, Any]:
    """Configures PyTorch's compiler for this process and returns its options.

    Raises:
        Exception: any exception, if this PyTorch cannot compile.
    """
    use_folder()
    import torch._dynamo
    import torch._inductor
    import torch.fx.experimental._config

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    # Sizes that happen to be equal at first (of text and image, say) are not assumed to be equal always.
    torch.fx.experimental._config.use_duck_shape = False
    compilations.register()
    options = dict(torch._inductor.list_mode_options(settings.mode))
    # The attentions keep their order, which all ranks share; so may the operations between them.
    wanted = {"reorder_for_peak_memory": False}
    known = torch._inductor.list_options()
    return options | {name: value for name, value in wanted.items() if name in known}


def plain(argument: Any) -> Any:
    """Normalises a tensor: a view becomes a tensor that is not a view, a contiguous tensor gets canonical strides.

    The compiler's guards depend on the base of a view and on the stride of a dimension of size 1; for the first block's
    input, and for a compiled block's result, these often differ from the other blocks'.
    """
    if not isinstance(argument, Tensor):
        return argument
    if argument.is_contiguous() and argument.stride() != (strides := _strides(argument.shape)):
        argument = argument.as_strided(argument.shape, strides)
    return argument.data if argument._is_view() else argument


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor of this shape."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def describe(error: BaseException) -> str:
    """Returns the class and first line of the innermost error; the compiler's full messages are pages long."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
