"""Builds ComfyUI's own MODEL around a network that lives in the workers.

ComfyUI's `BaseModel` keeps conditioning, sampling, latent format and CFG; only its `diffusion_model` is replaced, by a
proxy whose parameters have no data. So every sampler, guider, scheduler and ModelSampling node works unchanged.
"""

from __future__ import annotations

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..parallel.checkpoints.source import SAFETENSORS
from ..parallel.config import SequenceParallelConfig, resolve
from ..parallel.errors import NoPlanError, UnsupportedError
from ..parallel.host.recipe import Inspected, Recipe, inspect
from ..parallel.host.remote_model import RemoteModel
from .native_network import load_planned_model
from .proxy import ProxyDiffusionModel
from .shell_patcher import SequenceParallelPatcher
from .side_by_side import side_by_side
from .watching import watched

WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The choices of ComfyUI's own loader."""


def load_native_model(path: str, weight_dtype: str, config: SequenceParallelConfig) -> SequenceParallelPatcher:
    """A MODEL for the checkpoint at `path`. Reads the file's header only, and starts no process.

    Args:
        path: checkpoint file or diffusers folder.
        weight_dtype: a key of WEIGHT_DTYPES.
        config: devices and degrees.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: with a message for the user.
    """
    if weight_dtype == "fp8_e4m3fn_fast":
        raise UnsupportedError(
            "weight_dtype fp8_e4m3fn_fast is not supported; use fp8_e4m3fn, or default with FP8 Quantize (SP)"
        )
    try:
        inspected = inspect(path)
    except UnsupportedError as reason:
        return _planned(path, weight_dtype, config, reason)
    layout = resolve(config)
    worker_device = torch.device(layout.devices[0].name)

    network = _meta_state_dict(inspected)
    model_config = comfy.model_detection.model_config_from_unet(network, "", metadata=inspected.source.metadata or None)
    if model_config is None:
        raise UnsupportedError(f"{path}: this ComfyUI does not recognise the model")

    # The same choice of dtypes as comfy.sd.load_diffusion_model_state_dict makes.
    supported = list(model_config.supported_inference_dtypes)
    scaled = bool(inspected.source.scales)  # a file of scaled fp8 keeps it, and its dtype decides nothing else
    storage = (None if scaled else WEIGHT_DTYPES[weight_dtype]) or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(network),
        supported_dtypes=supported,
        weight_dtype=None if scaled else comfy.utils.weight_dtype(network),
    )
    manual_cast = comfy.model_management.unet_manual_cast(None if scaled else storage, worker_device, supported)
    model_config.set_inference_dtype(storage, manual_cast)

    recipe = Recipe(path=path, weight_dtype=storage, compute_dtype=manual_cast or storage, config=config)
    remote = RemoteModel(recipe, inspected)

    model_config.unet_config["disable_unet_model_creation"] = True
    model = model_config.get_model(network, "")
    parameters = model_config.process_unet_state_dict(dict(network))
    # ComfyUI renames tensors there; they remain the same objects.
    names = {id(tensor): name for name, tensor in network.items()}
    model.diffusion_model = ProxyDiffusionModel(
        remote,
        parameters,
        model_config.unet_config,
        storage,
        {name: names[id(tensor)] for name, tensor in parameters.items() if id(tensor) in names},
    )
    # Each device holds its share of the activations only; ComfyUI decides by this whether cond and uncond fit together.
    model.memory_usage_factor /= layout.world_size

    load_device = comfy.model_management.get_torch_device()
    patcher = SequenceParallelPatcher(
        model,
        load_device=load_device,
        offload_device=comfy.model_management.unet_offload_device(),
        size=remote.expected_bytes() if layout.uses(load_device.type, load_device.index) else 1,
    )
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "sequence_parallel", side_by_side)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "sequence_parallel", watched)
    return patcher


def _planned(
    path: str, weight_dtype: str, config: SequenceParallelConfig, reason: UnsupportedError
) -> SequenceParallelPatcher:
    """A model that no adapter takes runs as ComfyUI's own class, if that has a plan.

    Raises:
        UnsupportedError: it has none; the adapters' reason.
    """
    if not path.endswith(SAFETENSORS):
        raise reason
    try:
        return load_planned_model(path, WEIGHT_DTYPES[weight_dtype], config)
    except NoPlanError:
        raise reason from None


def _meta_state_dict(inspected: Inspected) -> dict[str, torch.Tensor]:
    """The network as ComfyUI's detection wants to see it: its own tensor names, without data."""
    if inspected.source.is_diffusers:
        shapes = inspected.adapter.native_tensors(inspected.model_config)
        dtype = next(iter(inspected.source.tensors.values())).dtype
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in inspected.source.tensors.items()
    }
