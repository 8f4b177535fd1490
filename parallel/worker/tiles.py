"""A worker's operations for the parallel VAE, which runs one tile after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..errors import EngineError, UnsupportedError
from ..wire.messages import BeginTiles, LoadVAE, Operation, Tile, UnloadVAE
from ..wire.shared import TensorRef, dtype_name
from ..wire.typed import to_plain
from .host_link import HostLink
from .native_vae import NativeVAE

Operations = dict[type[Operation], Callable[[Any], dict[str, Any]]]
"""Maps each message class to its handler, which returns JSON."""


class Tiles:
    """The VAEs of one rank."""

    def __init__(self, link: HostLink, device: torch.device, give_memory_back: Callable[[], None]):
        self._link, self._device, self._give_memory_back = link, device, give_memory_back
        self._vaes: dict[str, NativeVAE] = {}
        self.operations: Operations = {
            LoadVAE: self._load,
            UnloadVAE: self._unload,
            BeginTiles: self._begin,
            Tile: self._tile,
        }

    def _load(self, message: LoadVAE) -> dict[str, Any]:
        """Rebuilds ComfyUI's VAE with the weights that the host shares; a CPU rank computes with them in place.

        Raises:
            UnsupportedError: the result would not be the same VAE.
        """
        state = {name: self._link.tensor(ref) for name, ref in message.state.items()}
        vae = NativeVAE(message.source, state, self._device)
        self._vaes[message.vae] = vae
        if self._device.type != "cpu":
            self._link.drop(message.vae)
        return {"nbytes": vae.nbytes}

    def _unload(self, message: UnloadVAE) -> dict[str, Any]:
        self._vaes.pop(message.vae, None)
        self._link.drop(message.vae)
        self._give_memory_back()
        return {}

    def _begin(self, message: BeginTiles) -> dict[str, Any]:
        """Checks that the VAE is loaded. The message, sent to all ranks, also announces the tiles' segments to them."""
        if message.vae not in self._vaes:
            raise EngineError(f"the workers do not have {message.vae} any more: queue the prompt again")
        return {}

    def _tile(self, message: Tile) -> dict[str, Any]:
        """Decodes or encodes one tile."""
        self._link.stop_if_cancelled("before a tile")
        self._link.beat()
        began = time.perf_counter()
        try:
            x = self._link.tensor(message.x).as_strided(message.shape, message.stride)
            result = self._vaes[message.vae].run(message.direction, x)
            room = message.out
            ref = TensorRef(room.segment, room.offset, tuple(result.shape), dtype_name(result.dtype))
            if ref.nbytes > room.size:
                raise UnsupportedError(f"a tile of {ref.nbytes} bytes came out where {room.size} were expected")
            self._link.tensor(ref).copy_(result)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        return {"seconds": time.perf_counter() - began, "out": to_plain(ref)}
