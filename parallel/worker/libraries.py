"""diffusers in a worker: imported while the ranks meet; an installation that cannot import it is described by name."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch

from ..adapters import registry
from ..adapters.base import Adapter
from ..errors import UnsupportedError
from ..versions import describe_libraries


class Libraries:
    """Imports a family's model class in a thread, beside what the main thread waits for: its GPU's peers.

    diffusers imports torch._dynamo, and transformers, peft and others where they are installed: 2 to 5 s of processor
    time. Nothing is kept from it: what such a package finds missing is its own to decide.

    Two threads that import modules which import each other may see them half initialized, so the main thread imports
    nothing until `wait` has returned.

    Args:
        family: whose class is needed first; None imports nothing ahead.
        device: made current in the thread, too: CUDA's current device is one of each thread, and a package that looks
            at "the" GPU while it is imported would take memory of the first one.
    """

    def __init__(self, family: str | None, device: torch.device):
        self._waited = 0.0
        self._thread: threading.Thread | None = None
        if family is not None:
            arguments = (registry.FAMILIES[family](), device)
            self._thread = threading.Thread(target=_import_ahead, args=arguments, name="libraries", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when the thread has ended."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            self._waited += time.perf_counter() - began

    def take_waited(self) -> float:
        """Seconds that `wait` took since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited


def _import_ahead(adapter: Adapter, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.suppress(Exception):  # loading a model imports it again, and says what is wrong
        adapter.model_class()


def model_class(adapter: Adapter) -> Any:
    """The family's class of diffusers.

    Raises:
        UnsupportedError: it cannot be imported, with the versions of all packages that diffusers imports.
    """
    try:
        return adapter.model_class()
    except Exception as error:  # an optional package of diffusers may raise anything while it is imported
        raise UnsupportedError(
            f"diffusers cannot be imported: {type(error).__name__}: {error} ({describe_libraries()})."
            " Some of these packages do not fit together; `pip install -U -r requirements.txt` in this pack's folder,"
            " with the Python that runs ComfyUI, brings a set that does"
        ) from error
