"""The library that a network's class is of, in a worker: imported while the ranks meet, where the host knows which."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..comfyui.start import prepare
from ..split.hooks import MakeRoutes
from ..split.sites import Plan


class NetworkFile(Protocol):
    """A network's file, mapped; see `comfyui.network.NetworkFile` and `diffusers.folder.NetworkFile`."""

    routes: MakeRoutes
    """How attention is reached in the library's networks."""
    attention: str
    """What it computes with there, by the names of `attention.kernels`."""

    def tensors(self) -> dict[str, Tensor]: ...

    def network(self) -> tuple[nn.Module, dict[str, torch.dtype]]: ...

    def plan(self, network: nn.Module) -> Plan: ...


def library_of(recipe: Mapping[str, Any]) -> Callable[[str, torch.dtype | None, torch.device], NetworkFile]:
    """Imports what builds a recipe's network, and returns what opens its file: by path, dtype and device.

    Args:
        recipe: see `host.recipe.Recipe.to_json`.

    Raises:
        UnsupportedError: diffusers cannot be imported.
    """
    if recipe["library"] == "comfyui":
        prepare(**recipe["options"])
        network_file: Callable[..., NetworkFile] = importlib.import_module("..comfyui.network", __package__).NetworkFile
        return partial(network_file, pack=recipe["pack"]) if recipe.get("pack") else network_file
    folder = importlib.import_module("..diffusers.folder", __package__)
    folder.transformer_class(recipe["network"])
    return folder.NetworkFile


class Libraries:
    """Imports a library in a thread, beside what the main thread waits for: its GPU's peers.

    Both take 2 to 5 s of processor time, with transformers, peft and others where they are installed. Nothing is kept
    from them: what such a package finds missing is its own to decide.

    Two threads that import modules which import each other may see them half initialized, so the main thread imports
    nothing until `wait` has returned.

    Args:
        first: recipe of the model that will be loaded first; None imports nothing ahead.
        device: made current in the thread, too: CUDA's current device is one of each thread, and a package that looks
            at "the" GPU while it is imported would take memory of the first one.
    """

    def __init__(self, first: Mapping[str, Any] | None, device: torch.device):
        self._waited = 0.0
        self._thread: threading.Thread | None = None
        if first is not None:
            self._thread = threading.Thread(target=_import_ahead, args=(first, device), name="libraries", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when the thread has ended. From then on Python collects garbage."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            self._waited += time.perf_counter() - began
        if not gc.isenabled():  # since `boot`
            gc.freeze()  # what is imported stays: no collection between two steps goes through it again
            gc.enable()

    def take_waited(self) -> float:
        """Seconds that `wait` took since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


def _import_ahead(first: Mapping[str, Any], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.suppress(Exception):  # loading the model imports it again, and says what is wrong
        library_of(first)
