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
        """Runs before every use, even if the weights are loaded."""

    def _load(self) -> None:
        """Loads the weights into the workers as this clone requires them."""
        raise NotImplementedError

    def get_free_memory(self, device: Any) -> Any:
        """Returns the free memory, plus what the device's worker has reserved but not used: its next step can use it.

        Otherwise ComfyUI would find less memory from the second step on, and might split a batch that was whole before.
        """
        group, device = self.held.group, torch.device(device)
        cached = 0 if group is None else group.cached_on(f"{device.type}:{device.index or 0}")
        return super().get_free_memory(device) + cached

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Loads all weights, and returns the bytes added. ComfyUI calls it before every use."""
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
        """Returns 0: this process's memory holds no weight."""
        return 0


def progress_bar() -> Progress:
    """Returns a callback that shows progress on the node that runs; while weights are read, also each worker's as text.

    The bar appears with the first progress.
    """
    bar: comfy.utils.ProgressBar | None = None
    text = LoadText()

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)
        text.update()

    return progress
