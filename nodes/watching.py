"""Follows each sampling: counts its steps for the panel, and shows on the sampling node how it is split."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ..parallel.host import running
from ..parallel.host.remote_model import RemoteModel
from ..parallel.host.status import Sampling
from .node_text import executing_node, show

_INTERVAL_S = 0.25
"""Minimum seconds between two texts while weights are read."""


class StepCounter:
    """A sampler's callback that counts the steps for the panel, then calls the sampling's own callback.

    Attributes:
        callback: the sampling's own callback, or None.
    """

    def __init__(self, remote: RemoteModel, sampling: Sampling, callback: Any):
        self.callback = callback
        self._remote, self._sampling = remote, sampling

    def __call__(self, step: int, x0: Any, x: Any, total_steps: int) -> None:
        self.count(step + 1)
        if self.callback is not None:
            self.callback(step, x0, x, total_steps)

    def count(self, done: int) -> None:
        """Sets the number of finished steps; at the first call, shows the split on the node."""
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
    """Wraps OUTER_SAMPLE to follow the sampling; set by Load Diffusion Model (SP)."""
    remote: RemoteModel = executor.class_obj.model_patcher.remote
    with Sampling(remote.name, steps=max(0, len(sigmas) - 1)) as sampling:
        count = StepCounter(remote, sampling, callback)
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, count, *args, **kwargs)
    show(executing_node(), describe(remote, sampling))
    return result


def describe(remote: RemoteModel, sampling: Sampling) -> str:
    """Describes the last step: degrees, time per step if known, and the reason. Short: a node shows two lines."""
    group = remote.weights.group
    if group is None or group.figures.plan is None:
        return ""
    degrees, reason = group.figures.plan
    chosen = group.layout.reason  # tells the user if `auto` found only one GPU
    seconds = sampling.seconds_per_step
    above_1 = [f"{axis} {size}" for axis, size in dataclasses.asdict(degrees).items() if size > 1]
    timing = "" if seconds is None else f", {seconds:.2f} s per step"
    return f"{' × '.join(reversed(above_1))}{timing} ({reason})" if above_1 else f"one device{timing} ({chosen})"


class LoadText:
    """Progress of each worker in reading its weights, as text on the node that waits for it."""

    def __init__(self) -> None:
        self._told = 0.0

    def update(self) -> None:
        """Shows the text, unless no worker reads weights or it was shown less than `_INTERVAL_S` ago."""
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
