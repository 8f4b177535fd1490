"""Import of the library that provides a network's class; runs while the ranks meet if the host names the model."""

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
    """A network's memory-mapped file; see `comfyui.network.NetworkFile` and `diffusers.folder.NetworkFile`."""

    routes: MakeRoutes
    """Factory of the routes that hook the attention of the library's networks."""
    attention: str
    """Name of the attention kernel that the library uses, as in `attention.kernels`."""

    def tensors(self) -> dict[str, Tensor]: ...

    def network(self) -> tuple[nn.Module, dict[str, torch.dtype]]: ...

    def plan(self, network: nn.Module) -> Plan: ...


def library_of(recipe: Mapping[str, Any]) -> Callable[[str, torch.dtype | None, torch.device], NetworkFile]:
    """Imports the library that builds a recipe's network; returns the function that opens its file.

    That function takes a path, a dtype and a device.

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
    """Imports a library in a thread while the main thread waits for the other ranks.

    Importing either library takes 2 to 5 s of processor time, including transformers, peft and other packages where
    they are installed. No package is hidden from the libraries: each handles its missing dependencies itself.

    Two threads that import mutually dependent modules may see them half initialized, so the main thread imports nothing
    until `wait` has returned.

    Args:
        first: recipe of the model that will be loaded first; None imports nothing ahead.
        device: made current in the thread, too: CUDA's current device is set per thread, and a package that uses the
            current GPU during its import would otherwise allocate memory on the first one.
    """

    def __init__(self, first: Mapping[str, Any] | None, device: torch.device):
        self._waited = 0.0
        self._thread: threading.Thread | None = None
        if first is not None:
            self._thread = threading.Thread(target=_import_ahead, args=(first, device), name="libraries", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Waits until the thread has ended, then enables garbage collection."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            self._waited += time.perf_counter() - began
        if not gc.isenabled():  # since `boot`
            gc.freeze()  # imported objects stay: no collection between two steps scans them again
            gc.enable()

    def take_waited(self) -> float:
        """Returns the seconds spent in `wait` since the last call of this method."""
        waited, self._waited = self._waited, 0.0
        return waited


def _import_ahead(first: Mapping[str, Any], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.suppress(Exception):  # loading the model imports it again, and reports the error
        library_of(first)
