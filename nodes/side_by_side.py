"""Runs cond and uncond at the same time, even if ComfyUI calls the network for one after the other.

ComfyUI puts both into one call only if their shapes agree and its memory estimate allows it. Otherwise it makes two
calls in a row, and half of the devices of `cfg_degree` 2 would be idle. So, at the first call, this module lets ComfyUI
prepare the second one too, up to the call of the network, and sends both to the workers together. The second call then
takes the result that is ready, if its inputs are exactly the foreseen ones; otherwise it runs by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor

from ..parallel.degrees import Degrees
from ..parallel.sampling.recording import RecordedLatent
from ..parallel.sampling.step_request import StepRequest

log = logging.getLogger("sequence_parallel")


class Recorded(BaseException):
    """Carrier of a call's inputs out of ComfyUI's preparation. It is no error, hence no Exception."""

    def __init__(self, request: StepRequest):
        super().__init__()
        self.request = request


class Splits(Protocol):
    """Interface of the object that decides how conditions are split."""

    def degrees(self, conditions: int) -> Degrees: ...


class LookAhead:
    """Foreseen calls of one model and their results, for the duration of one CALC_COND_BATCH."""

    def __init__(self, remote: Splits):
        self._remote = remote
        self._prepare: dict[int, Callable[[], None]] = {}
        self._results: list[tuple[StepRequest, Tensor]] = []
        self.recording = False

    @contextmanager
    def over(self, prepare: dict[int, Callable[[], None]]) -> Iterator[None]:
        """Allows look-ahead inside the `with` block.

        Args:
            prepare: index of each condition → function that calls the network for it alone.
        """
        self._prepare = prepare
        try:
            yield
        finally:
            self._prepare = {}
            self._results.clear()

    def others(self, running: Sequence[int]) -> list[StepRequest]:
        """Returns the calls that will follow that of the conditions `running`; empty if they cannot run beside it."""
        waiting = [index for index in self._prepare if index not in running]
        if not waiting or self._remote.degrees(conditions=len(set(running)) + len(waiting)).groups == 1:
            return []
        prepare, self._prepare = self._prepare, {}
        requests = []
        self.recording = True
        try:
            for index in waiting:
                try:
                    prepare[index]()
                except Recorded as recorded:
                    requests.append(recorded.request)
        finally:
            self.recording = False
        return requests

    def keep(self, requests: Sequence[StepRequest], predictions: Sequence[Tensor]) -> None:
        self._results += zip(requests, predictions, strict=True)

    def take(self, request: StepRequest) -> Tensor | None:
        """Returns the result of a foreseen call with exactly these inputs, or None."""
        for i, (foreseen, prediction) in enumerate(self._results):
            if _same(foreseen, request):
                del self._results[i]
                return prediction
        return None


def side_by_side(
    executor: Any, model: Any, conds: list[Any], x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """Wraps CALC_COND_BATCH to run conditions side by side; set by Load Diffusion Model (SP)."""
    present = [index for index, cond in enumerate(conds) if cond]
    if isinstance(x_in, RecordedLatent):  # nothing runs now; the recorder puts both side by side
        return executor(model, conds, x_in, timestep, model_options)
    if len(present) < 2 or _has_side_effects(model_options):
        return executor(model, conds, x_in, timestep, model_options)

    def alone(index: int) -> Callable[[], None]:
        only = [cond if i == index else None for i, cond in enumerate(conds)]
        return lambda: executor(model, only, x_in, timestep, model_options)

    with model.diffusion_model.look_ahead.over({index: alone(index) for index in present}):
        return executor(model, conds, x_in, timestep, model_options)


def _has_side_effects(model_options: dict[str, Any]) -> bool:
    """Returns True if another node's code could notice that a call is prepared twice."""
    wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, model_options, is_model_options=True)
    return bool(wrappers) or "model_function_wrapper" in model_options


def _same(a: StepRequest, b: StepRequest) -> bool:
    if a.conditioning.keys() != b.conditioning.keys() or (a.arguments, a.parts) != (b.arguments, b.parts):
        return False
    pairs = [(a.x, b.x), (a.timestep, b.timestep), *((a.conditioning[n], b.conditioning[n]) for n in a.conditioning)]
    return all(p.shape == q.shape and p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)
