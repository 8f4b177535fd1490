"""ComfyUI's memory management for weights that are in the workers."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ..parallel.errors import WorkerOutOfMemoryError
from ..parallel.host.calls import Progress
from ..parallel.host.resident import Resident
from .watching import LoadText


class WorkersPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that moves no tensors: it asks the workers to load and to free. All or nothing.

    `clone` is inherited, so clones share the model, as ComfyUI expects.
    """

    @property
    def held(self) -> Resident:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Before every use, loaded or not."""

    def _load(self) -> None:
        """Brings the weights in the workers to what this clone says."""
        raise NotImplementedError

    def get_free_memory(self, device: Any) -> Any:
        """Also what the worker on this device has taken and does not use: its next step can have it.

        Without it ComfyUI would find less room from the second step on, and might part a batch that was one before.
        """
        group, device = self.held.group, torch.device(device)
        cached = 0 if group is None else group.cached_on(f"{device.type}:{device.index or 0}")
        return super().get_free_memory(device) + cached

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Runs before every use."""
        self._prepare()
        before = self.loaded_size()
        try:
            self._load()
        except BaseException as error:
            # ComfyUI forgets a model that did not load: what has been loaded of it could never be unloaded.
            self.detach()
            if isinstance(error, WorkerOutOfMemoryError):
                raise comfy.model_management.OOM_EXCEPTION(str(error)) from error
            raise
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid
        return self.loaded_size() - before

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        freed = self.loaded_size()
        self.detach()
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.held.unload()
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None
            self.model.device = self.offload_device
        super().unpatch_model(None, unpatch_weights=False)

    def load(self, *args: Any, **kwargs: Any) -> None:
        self._load()

    def lowvram_patch_counter(self) -> int:
        return 0

    def get_ram_usage(self) -> int:
        """The server's own memory holds no weight."""
        return 0


def progress_bar() -> Progress:
    """Shown by the node that runs, from the first progress on; while weights are read, each worker's as text."""
    bar: comfy.utils.ProgressBar | None = None
    text = LoadText()

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)
        text.update()

    return progress
