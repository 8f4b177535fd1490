"""ComfyUI's VAE in the workers, as the host holds it: its weights come and go, its tiles are computed."""

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
from ..wire.shared import lay_out
from . import running
from .group import Poll, Progress, WorkerGroup
from .tiles import Tile, TileFigures, TileRun

log = logging.getLogger("sequence_parallel")

_VAES = itertools.count(1)


class RemoteVAE:
    """One VAE, and where its weights are now. Sent once; `ensure_loaded` sends them again when they have gone.

    Args:
        config: whose devices compute.
        source: see `worker.native_vae.NativeVAE`.
        state: gives the state dict, when it is to be sent.
    """

    def __init__(
        self, config: SequenceParallelConfig, source: Mapping[str, Any], state: Callable[[], Mapping[str, Tensor]]
    ):
        self.name = f"vae-{next(_VAES)}"
        self.nbytes = 0
        """Bytes of weights that one worker holds; 0 when not loaded."""
        self.last_run: TileFigures | None = None
        """Figures only: a run's tiles would keep the input and the VAE alive."""
        self._config = config
        self._source = dict(source)
        self._state = state
        self._refused = ""
        """Why the workers cannot have this VAE, once that is known."""
        self._group: WorkerGroup | None = None
        self._generation = 0

    @property
    def loaded(self) -> bool:
        return self._group is not None and self._group.alive and self._group.generation == self._generation

    @property
    def group(self) -> WorkerGroup | None:
        return self._group

    def ensure_loaded(self, poll: Poll | None = None) -> int:
        """Starts workers and sends the weights unless both have been done.

        Returns:
            Bytes of weights on one worker.

        Raises:
            UnsupportedError: the workers would not compute with the same VAE.
            WorkerError: a worker failed.
        """
        if self._refused:
            raise UnsupportedError(self._refused)
        group = running.acquire(self._config, poll)
        if self.loaded and group is self._group:
            return self.nbytes
        self._group, self._generation = None, 0
        state = self._state()
        refs, size = lay_out(self.name, [(tensor.shape, tensor.dtype) for tensor in state.values()])
        group.settle(poll)
        segment = group.memory.segment(self.name, size)
        for tensor, ref in zip(state.values(), refs, strict=True):
            segment.tensor(ref).copy_(tensor)
        message = LoadVAE(vae=self.name, source=self._source, state=dict(zip(state, refs, strict=True)))
        try:
            self.nbytes = max(result["nbytes"] for result in group.call(message, poll=poll))
        except BaseException as error:
            group.memory.drop(self.name)
            if group.alive:
                group.post(UnloadVAE(vae=self.name))
            if isinstance(error, WorkerError) and error.remote_type == UnsupportedError.__name__:
                self._refused = str(error)
                raise UnsupportedError(self._refused) from error
            raise
        if group.layout.device_type != "cpu":
            group.memory.drop(self.name)  # each worker has its own copy now
        self._group, self._generation = group, group.generation
        group.figures.holds(self.name, "VAE", self.nbytes)
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
        group = self._group
        assert group is not None, "call ensure_loaded first"
        group.settle(poll)
        run = TileRun(group, self.name, direction, tiles, dtype, poll=poll, on_progress=on_progress)
        run.announce()
        self.last_run = run.figures
        return run

    def unload(self) -> None:
        """Frees the weights in the workers and the copy that they shared; the processes stay."""
        group, was_loaded = self._group, self.loaded
        self._group, self._generation, self.nbytes = None, 0, 0
        if group is not None and was_loaded:
            group.memory.drop(self.name)
            group.figures.dropped(self.name)
            try:
                group.call(UnloadVAE(vae=self.name))
            except WorkerError as error:  # the weights have gone with the workers
                log.warning("%s", error)

    def release(self) -> None:
        """As `unload`, without waiting: for a finalizer, which may run in the middle of anything."""
        if self._group is not None and self.loaded:
            self._group.memory.drop(self.name)
            self._group.figures.dropped(self.name)
            self._group.post(UnloadVAE(vae=self.name))
        self._group, self._generation = None, 0
