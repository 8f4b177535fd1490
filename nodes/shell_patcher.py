"""ComfyUI's handle on a model whose weights are in the workers: loading, unloading, sizes and refusals."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NoReturn

import comfy.hooks
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..parallel.comfyui import contract, gguf
from ..parallel.comfyui.detection import detect, quantised_layers
from ..parallel.host.remote_model import RemoteModel
from ..parallel.host.remote_weights import Patches, RemoteWeights, Replace
from .attached_fp8 import attached_fp8
from .gguf_pack import gguf_patcher
from .lora import patched_layer, patched_weight, refuse_patches
from .node_text import tell
from .refusals import refuse, refuse_sampling_functions, warn_of_native_compile
from .residency import WorkersPatcher, progress_bar


class SequenceParallelPatcher(WorkersPatcher):
    """A ModelPatcher that moves no tensors: it asks the workers to load, to patch and to free.

    `clone` is inherited, so clones share the model, as ComfyUI expects.
    """

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0, **options: Any):
        super().__init__(model, load_device, offload_device, size, **options)
        if not hasattr(model, "sequence_parallel_finalizer"):
            # ComfyUI does not call `detach` on models that it drops from its cache.
            model.sequence_parallel_finalizer = weakref.finalize(model, _forget, model.diffusion_model.remote)
            model.sequence_parallel_finalizer.atexit = False
            model.sequence_parallel_device = load_device

    @property
    def remote(self) -> RemoteModel:
        return self.model.diffusion_model.remote

    @property
    def held(self) -> RemoteWeights:
        return self.remote.weights

    def model_size(self) -> int:
        """Returns the bytes that ComfyUI has to free: one worker's weights on its device, in their placement mode."""
        if self.size <= 1:  # no worker uses the device that ComfyUI watches
            return int(self.size)
        fp8 = attached_fp8(self)
        return self.held.expected_bytes(None if fp8 is None else fp8.settings)

    # --- residency ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._refuse_patches()
        refuse_sampling_functions(self.model_options)
        warn_of_native_compile(self.model_options)
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)

    def _load(self) -> None:
        """Defers loading to the next step: nothing is started or read for inputs that are refused, nor for nodes that
        load a model for another purpose and are refused, e.g. those that save it.
        """
        self.model.diffusion_model.load_weights = self._load_weights
        self.model.diffusion_model.restore_weights = partial(self._bring_weights, again=True)

    def _load_weights(self) -> None:
        try:
            self.remote.retry.run(self._bring_weights, lambda: None, "the loading of the model")
        except BaseException:
            self.detach()  # what has been loaded so far does not count as loaded
            raise

    def _bring_weights(self, again: bool = False) -> None:
        """Starts the workers if necessary, and loads this clone's weights and patches into them.

        Args:
            again: True after lost workers: the weights keep their placement.
        """
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        fp8, weights = attached_fp8(self), self.held
        names, replace = self._replacement()
        settings = None if fp8 is None else fp8.settings
        weights.ensure_loaded(poll=poll, on_progress=progress_bar(), fp8=settings, again=again)
        weights.replace(self.patches_uuid if names else None, names, replace, poll=poll, on_progress=progress_bar())
        if fp8 is not None:
            tell(fp8.node_id, str(weights.fp8_report))

    def _replacement(self) -> tuple[Collection[str], Replace]:
        """Returns the network's names of the patched weights, and a function that patches one of the file's weights."""
        names = [key.removeprefix("diffusion_model.") for key in self.patches]
        recipe = self.remote.recipe
        tensors: dict[str, torch.Tensor] = {}
        if names:
            file = detect(recipe.path, recipe.weight_dtype, self.load_device, pack=recipe.pack)
            tensors = file.named_as_in_the_network()
        quantised = quantised_layers(tensors)
        kept = {name: parameter.dtype for name, parameter in self.model.diffusion_model.named_parameters()}

        patcher = gguf_patcher() if recipe.pack else ModelPatcher

        def patched(name: str) -> torch.Tensor | Patches:
            key = f"diffusion_model.{name}"
            if name not in tensors:
                raise refuse(f"a patch of {key} (a weight that {recipe.path} does not have)", "remove its node")
            layer, _, leaf = name.rpartition(".")
            if f"{layer}." in quantised and leaf == "weight":
                return patched_layer(self.patches, key, self._quantised_layer(layer, tensors), self.load_device)
            if is_traceable_wrapper_subclass(tensors[name]):  # GGUF: the layer adds them when it restores the weight
                return Patches(gguf.plain_patches(key, self.patches[key], tensors[name].shape))
            return patched_weight(self.patches, key, tensors[name].to(kept[name]), self.load_device, patcher)

        return names, patched

    def _quantised_layer(self, path: str, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """Makes a layer of ComfyUI's class with the file's values; without its bias, which is no part of the weight."""
        ours = self.model.diffusion_model.get_submodule(path)
        layer: torch.nn.Module = type(ours)(ours.in_features, ours.out_features, bias=False)
        start = f"{path}."
        layer.load_state_dict(
            {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}, strict=False
        )
        return layer

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.model.diffusion_model.load_weights = None
        super().unpatch_model(device_to, unpatch_weights)

    def cleanup(self) -> None:
        """Removes object patches (e.g. ModelSampling's) from the model that all clones share, after every sampling.

        ComfyUI keeps them until the next load; until then a graph without the patch would still see it.
        """
        super().cleanup()
        self.model.diffusion_model.load_weights = self.model.diffusion_model.restore_weights = None
        self.unpatch_model(unpatch_weights=False)
        self.remote.rest()

    # --- refused by name --------------------------------------------------------------------------------------------

    def _refuse_patches(self) -> None:
        if self.load_device != self.model.sequence_parallel_device:
            raise refuse("Select Model Device", "choose the devices in SP Config")
        for name in self.object_patches:
            if name == "manual_cast_dtype":
                raise refuse("ModelComputeDtype", "choose the dtype with ComfyUI's command line, or remove the node")
            if name.endswith(".default_ref_method"):
                raise refuse("FluxKVCache", "remove the node")
            if name.startswith("diffusion_model"):
                raise refuse(f"a patch of the network's {name.partition('.')[2] or 'forward'!r}")

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        """Keeps LoRAs as ComfyUI does; they take effect in `_load_weights`."""
        contract.require("loras")
        refuse_patches(patches)
        return super().add_patches(patches, strength_patch, strength_model)

    def set_injections(self, key: str, injections: Any) -> NoReturn:
        if key == "bypass_lora":
            raise refuse("a LoRA in bypass mode", "use Load LoRA")
        raise refuse(f"code injected into the network ({key})")

    def add_callback_with_key(self, call_type: str, key: str, callback: Any) -> None:
        """Refuses BlockSparseAttention, whose own error would name another model."""
        if key == "block_sparse_attention":
            raise refuse("BlockSparseAttention")
        super().add_callback_with_key(call_type, key, callback)

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse("a LoRA hook", "remove the hook node")

    def register_all_hook_patches(
        self, hooks: Any, target_dict: Any, model_options: Any = None, registered: Any = None
    ):
        if hooks.get_type(comfy.hooks.EnumHookType.Weight):
            raise refuse("a weight hook", "remove the hook node")
        return super().register_all_hook_patches(hooks, target_dict, model_options, registered)

    def add_weight_wrapper(self, name: str, function: Any) -> NoReturn:
        raise refuse("training or a weight wrapper")

    def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
        raise refuse("merging, extracting or saving the model (e.g. ModelMergeSimple)")

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse("saving the model")

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse("saving the model")

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse("MultiGPU CFG Split or Select Model Device", "remove it: SP Config chooses the devices")

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise refuse("patching a weight")


def _forget(remote: RemoteModel) -> None:
    remote.weights.release()
