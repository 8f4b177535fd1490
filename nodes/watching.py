"""Follows each sampling: counts its steps for the panel, and says on the node that samples how it is split."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ..parallel.host import running
from ..parallel.host.remote_model import RemoteModel
from ..parallel.host.status import Sampling
from .node_text import executing_node, show

_INTERVAL_S = 0.25
"""Between two texts while weights are read."""


class StepCounter:
    """A sampler's callback that counts the steps for the panel, before the callback that the sampling came with.

    Attributes:
        callback: that one, or None.
    """

    def __init__(self, remote: RemoteModel, sampling: Sampling, callback: Any):
        self.callback = callback
        self._remote, self._sampling = remote, sampling

    def __call__(self, step: int, x0: Any, x: Any, total_steps: int) -> None:
        self.count(step + 1)
        if self.callback is not None:
            self.callback(step, x0, x, total_steps)

    def count(self, done: int) -> None:
        """So many steps have been done."""
        first = self._sampling.step == 0
        self._sampling.advance(done)
        if first:
            show(executing_node(), describe(self._remote, self._sampling))


def watched(
    executor: Any,
    noise: Any,
    latent_image: Any,
    sampler: Any,
    sigmas: Any,
    denoise_mask: Any = None,
    callback: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An OUTER_SAMPLE wrapper, set by Load Diffusion Model (SP)."""
    remote: RemoteModel = executor.class_obj.model_patcher.remote
    with Sampling(remote.name, steps=max(0, len(sigmas) - 1)) as sampling:
        count = StepCounter(remote, sampling, callback)
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, count, *args, **kwargs)
    show(executing_node(), describe(remote, sampling))
    return result


def describe(remote: RemoteModel, sampling: Sampling) -> str:
    """The degrees of the last step, the time per step where it is known, and why; a node shows two lines."""
    group = remote.weights.group
    if group is None or group.figures.plan is None:
        return ""
    degrees, reason = group.figures.plan
    chosen = group.layout.reason  # one GPU, though `auto` was to take all of them: the user should see it
    seconds = sampling.seconds_per_step
    above_1 = [f"{axis} {size}" for axis, size in dataclasses.asdict(degrees).items() if size > 1]
    timing = "" if seconds is None else f", {seconds:.2f} s per step"
    return f"{' × '.join(reversed(above_1))}{timing} ({reason})" if above_1 else f"one device{timing} ({chosen})"


class LoadText:
    """How far each worker has read its weights, as text on the node that waits for it."""

    def __init__(self) -> None:
        self._told = 0.0

    def update(self) -> None:
        """Shows it, unless nobody reads or it was shown just now."""
        if time.monotonic() - self._told < _INTERVAL_S:
            return
        self._told = time.monotonic()
        ranks = [
            f"rank {rank['rank']} {100 * rank['progress'][0] // max(1, rank['progress'][1])} %"
            for group in running.snapshot()
            for rank in group["ranks"]
            if rank["progress"] is not None
        ]
        if ranks:
            show(executing_node(), f"Reading weights: {', '.join(ranks)}")
