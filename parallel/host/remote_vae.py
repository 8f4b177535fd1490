"""Host side of ComfyUI's VAE in the workers: loads and unloads its weights, and runs its tiles."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SequenceParallelConfig
from ..errors import UnsupportedError, WorkerError
from ..wire.messages import LoadVAE, UnloadVAE
from . import running
from .calls import Poll, Progress
from .group import WorkerGroup
from .resident import Resident
from .tiles import Tile, TileFigures, TileRun

log = logging.getLogger("sequence_parallel")

_VAES = itertools.count(1)


class RemoteVAE(Resident):
    """One VAE in the workers. Its weights are sent once; `ensure_loaded` sends them again if the workers lost them.

    Args:
        config: names the devices that compute.
        source: see `worker.native_vae.NativeVAE`.
        state: returns the state dict; called whenever it has to be sent.
    """

    def __init__(
        self, config: SequenceParallelConfig, source: Mapping[str, Any], state: Callable[[], Mapping[str, Tensor]]
    ):
        name = f"vae-{next(_VAES)}"
        super().__init__(name, UnloadVAE(vae=name))
        self.last_run: TileFigures | None = None
        """Figures of the last run; its tiles are not kept, because they would keep the input and the VAE alive."""
        self._config = config
        self._source = dict(source)
        self._state = state
        self._refused = ""
        """Reason why the workers cannot run this VAE; empty while none is known."""

    def ensure_loaded(self, poll: Poll | None = None) -> int:
        """Starts the workers and sends the weights, unless both have been done.

        Returns:
            Bytes of weights on one worker.

        Raises:
            UnsupportedError: the workers cannot rebuild exactly this VAE.
            WorkerError: a worker failed.
        """
        if self._refused:
            raise UnsupportedError(self._refused)
        group = running.acquire(self._config, poll)
        if self.loaded and group is self.group:
            return self.nbytes
        self.group = None
        state = self._state()
        group.settle(poll)
        refs = group.memory.write(self.name, list(state.values()))
        message = LoadVAE(vae=self.name, source=self._source, state=dict(zip(state, refs, strict=True)))
        try:
            results = group.call(message, poll=poll)
        except BaseException as error:
            group.memory.drop(self.name)
            if group.alive:
                group.post(self._goodbye)
            if isinstance(error, WorkerError) and error.remote_type == UnsupportedError.__name__:
                self._refused = str(error)
                raise UnsupportedError(self._refused) from error
            raise
        if group.layout.device_type != "cpu":
            group.memory.drop(self.name)  # each worker has its own copy now
        self._arrived(group, "VAE", max(result["nbytes"] for result in results))
        log.info("VAE: %.0f MiB of weights on each of %d workers", self.nbytes / 2**20, group.layout.world_size)
        return self.nbytes

    def start(
        self,
        direction: str,
        tiles: Sequence[Tile],
        dtype: torch.dtype,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ) -> TileRun:
        """Prepares a run of tiles; see `TileRun`."""
        run = TileRun(self.settled(poll), self.name, direction, tiles, dtype, poll=poll, on_progress=on_progress)
        self.last_run = run.figures
        return run

    def _left(self) -> WorkerGroup | None:
        if (group := super()._left()) is not None:
            group.memory.drop(self.name)  # the copy that CPU workers share
        return group
