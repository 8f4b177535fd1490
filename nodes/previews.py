"""Observers of a sampling that runs in the workers, and the steps at which they need its latents.

A sampler calls its callback at every step with the denoised latent. ComfyUI's own callback moves the progress bar,
makes a preview if previews are on, and keeps the latent if a node requests it. Only the last two need the latent,
which has to be sent to this process for them. The use that other code makes of it cannot be known.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from . import settings
from .refusals import node_of
from .watching import StepCounter

log = logging.getLogger("sequence_parallel")

_NATIVE = ("latent_preview", "prepare_callback.<locals>.callback")
"""Module and name of ComfyUI's callback."""


class Audience:
    """The callback of a sampling, split into its known parts.

    Attributes:
        wants_latents: True if an observer uses them.
        interval_s: minimum seconds between two latents; 0 for another node's callback, which gets those of every step.

    Raises:
        ConfigError: the setting has a value that is not allowed.
    """

    def __init__(self, callback: Any):
        self._callback = callback
        self._counters: list[StepCounter] = []
        while isinstance(callback, StepCounter):
            self._counters.append(callback)
            callback = callback.callback
        self._bar: Any = None
        interval_s = settings.read().preview_interval_seconds
        if callback is None:
            self.wants_latents, self.interval_s = False, 0.0
        elif (parts := _native_parts(callback)) is not None:
            self._bar = parts["pbar"]
            self.wants_latents = bool(parts["previewer"]) or parts["x0_output_dict"] is not None
            self.interval_s = interval_s
        else:
            self.wants_latents, self.interval_s = True, 0.0
            if interval_s:
                log.info("the preview interval is not used: %s may need every step's latents", node_of(callback))

    def show(self, step: int, denoised: Any, x: Any, steps: int) -> None:
        """Calls the callback with a finished step and its latents; has a sampler callback's signature."""
        if self._callback is not None:
            self._callback(step, denoised, x, steps)

    def count(self, done: int, steps: int) -> None:
        """Updates the step counters and the progress bar: `done` of `steps` steps are finished."""
        for counter in self._counters:
            counter.count(done)
        if self._bar is not None:
            self._bar.update_absolute(done, steps)


def _native_parts(callback: Any) -> dict[str, Any] | None:
    """Returns the objects of ComfyUI's callback: `pbar`, `previewer` (None if previews are off), `x0_output_dict`.

    Returns None for any other callback, or an unknown version of ComfyUI's: then it has to get every latent.
    """
    if (getattr(callback, "__module__", None), getattr(callback, "__qualname__", None)) != _NATIVE:
        return None
    parts = dict(inspect.getclosurevars(callback).nonlocals)
    return parts if {"pbar", "previewer", "x0_output_dict"} <= parts.keys() else None
