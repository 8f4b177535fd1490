"""Who follows a sampling that runs in the workers, and at which steps they need its latents.

A sampler calls its callback at every step with the denoised latent. ComfyUI's own callback moves the progress bar,
makes a preview if previews are on, and keeps the latent where a node asks for it. Only the last two need the latent,
which has to be sent here for them. What other code does with it cannot be known.
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
    """The callback of a sampling, taken apart as far as it is known.

    Attributes:
        wants_latents: whether somebody looks at them.
        interval_s: least seconds between two looks; 0 where another node's callback looks: it gets every step.

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
        """A step has been done, and these are its latents; as any callback."""
        if self._callback is not None:
            self._callback(step, denoised, x, steps)

    def count(self, done: int, steps: int) -> None:
        """So many steps have been done, of all."""
        for counter in self._counters:
            counter.count(done)
        if self._bar is not None:
            self._bar.update_absolute(done, steps)


def _native_parts(callback: Any) -> dict[str, Any] | None:
    """What ComfyUI's callback uses: `pbar`, `previewer` (None where previews are off) and `x0_output_dict`.

    None if it is other code, or none that is known: then nothing may be left out.
    """
    if (getattr(callback, "__module__", None), getattr(callback, "__qualname__", None)) != _NATIVE:
        return None
    parts = dict(inspect.getclosurevars(callback).nonlocals)
    return parts if {"pbar", "previewer", "x0_output_dict"} <= parts.keys() else None
