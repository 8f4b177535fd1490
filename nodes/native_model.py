"""Builds ComfyUI's own MODEL around a network that lives in the workers.

ComfyUI's `BaseModel` keeps conditioning, sampling, latent format and CFG; only its `diffusion_model` is replaced, by a
proxy whose parameters have no data. So every sampler, guider, scheduler and ModelSampling node works unchanged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP

from ..parallel.comfyui import contract, gguf
from ..parallel.comfyui.detection import Detected, detect, shapes
from ..parallel.comfyui.network import changed_dtypes
from ..parallel.config import SequenceParallelConfig, resolve
from ..parallel.errors import CheckpointError, UnknownModelError, UnsupportedError
from ..parallel.host.recipe import Recipe
from ..parallel.host.remote_model import RemoteModel
from ..parallel.plans.comfyui import READ, plan_of
from ..parallel.quantise.networks import linear_layers
from ..parallel.vae.arguments import as_plain
from .gguf_pack import pack_folder
from .proxy import ProxyDiffusionModel
from .shell_patcher import SequenceParallelPatcher
from .side_by_side import side_by_side
from .watching import watched

log = logging.getLogger("sequence_parallel")

WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The choices of ComfyUI's own loader."""

_SAFETENSORS = (".safetensors", ".sft")
_HEADS = ("num_attention_heads", "audio_num_attention_heads", "num_heads", "n_heads", "heads")
"""Names of the number of attention heads in the configs of ComfyUI's networks."""
_ENOUGH = 1 << 10
"""Number of heads assumed for a network with none of these names; it limits no degree."""


def load_native_model(path: str, weight_dtype: str, config: SequenceParallelConfig) -> SequenceParallelPatcher:
    """Makes a MODEL for the diffusion model at `path`. Reads only the file's header, and starts no process.

    Args:
        path: a safetensors or GGUF file, or a diffusers folder that `comfyui.detection` reads.
        weight_dtype: a key of WEIGHT_DTYPES.
        config: devices and degrees.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: with a message for the user.
    """
    if weight_dtype == "fp8_e4m3fn_fast":
        raise UnsupportedError(
            "weight_dtype fp8_e4m3fn_fast is not supported; use fp8_e4m3fn, or default with FP8 Quantize (SP)"
        )
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is not None and path.endswith(gguf.SUFFIX):
        raise UnsupportedError(f"weight_dtype is {weight_dtype!r}, and {path} is a GGUF file; set it to default")
    return _in_workers(_detected(path, dtype, config), path, dtype, config)


def load_native_checkpoint(path: str, config: SequenceParallelConfig) -> tuple[SequenceParallelPatcher, Any, Any]:
    """Makes MODEL, CLIP and VAE of the checkpoint at `path`.

    The MODEL needs only the file's header; CLIP and VAE are loaded by ComfyUI's own loader.

    Args:
        path: a safetensors file.
        config: devices and degrees.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: with a message for the user.
    """
    detected = _detected(path, None, config, checkpoint=True)
    model = _in_workers(detected, path, None, config)
    if not detected.checkpoint:  # ComfyUI does the same with a file that has only a diffusion model
        return model, None, comfy.sd.VAE(sd={})
    embeddings = folder_paths.get_folder_paths("embeddings")
    _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(path, output_model=False, embedding_directory=embeddings)
    return model, clip, vae


def _detected(
    path: str, dtype: torch.dtype | None, config: SequenceParallelConfig, *, checkpoint: bool = False
) -> Detected:
    contract.require("model")
    is_folder = Path(path).is_dir()
    if path.endswith(gguf.SUFFIX):
        contract.require("gguf")
    elif not is_folder and not path.endswith(_SAFETENSORS):
        raise UnsupportedError(
            f"{path}: workers read {' and '.join(_SAFETENSORS)} files only, and {gguf.SUFFIX} files if {gguf.PACK} is"
            " installed; they cannot map files of other formats, which can also run code. Use the model's safetensors"
            " file"
        )
    device = torch.device(resolve(config).devices[0].name)
    try:
        return detect(path, dtype, device, checkpoint=checkpoint, pack=pack_folder())
    except UnknownModelError as error:
        if is_folder:
            raise UnsupportedError(
                f"{path} is a diffusers folder that ComfyUI does not convert; use the model's single file for ComfyUI"
            ) from error
        raise


def _in_workers(
    detected: Detected, path: str, dtype: torch.dtype | None, config: SequenceParallelConfig
) -> SequenceParallelPatcher:
    layout = resolve(config)
    try:
        model = detected.base_model(torch.device("meta"))
    except Exception as error:  # the sizes in a damaged file can raise anything in ComfyUI's classes
        raise CheckpointError(
            f"{path}: ComfyUI recognises the model, and cannot make it ({type(error).__name__}: {error})"
        ) from error
    network = model.diffusion_model
    plan = plan_of(network)
    if ignored := detected.attention_choices(network)[1]:
        log.warning("%s chooses the attention of %d modules, which this ComfyUI does not know", path, len(ignored))
    if not plan:
        _refuse_splits(type(network).__name__, config)
    tensors = detected.named_as_in_the_network()
    pack = pack_folder() if path.endswith(gguf.SUFFIX) else ""
    if pack:
        gguf.check(path, pack, network, tensors)
    parameters = shapes(tensors)
    changed = changed_dtypes(parameters, network)
    dtypes = {name: changed.get(name, tensor.dtype) for name, tensor in parameters.items()}
    quantised = detected.quantised_as()
    kept = {name: tensor.nbytes for name, tensor in tensors.items() if name not in changed}
    remote = RemoteModel(
        Recipe(
            library="comfyui",
            path=path,
            weight_dtype=dtype,
            network=type(network).__name__,
            config=config,
            nbytes=sum(kept.values()) + sum(tensors[name].numel() * dtype.itemsize for name, dtype in changed.items()),
            in_the_file=sum(kept.values()),
            heads=_heads(detected),
            arguments=dict(detected.model_config.unet_config),
            channels=model.latent_format.latent_channels,
            linear=() if quantised else tuple(linear_layers(network, plan, dtypes)),
            quantised=quantised,
            planned=bool(plan),
            pack=pack,
            options={
                "folder": str(Path(comfy.sd.__file__).parent.parent),
                "arguments": as_plain(vars(comfy.cli_args.args)),
            },
        )
    )
    for name in READ.get(type(network).__name__, ()):
        network.register_buffer(name, tensors[name].to(dtypes[name], copy=True))
    model.diffusion_model = ProxyDiffusionModel(remote, network, parameters)
    # Each device holds its share of the activations only; ComfyUI decides by this whether cond and uncond fit together.
    model.memory_usage_factor /= layout.world_size
    load_device = comfy.model_management.get_torch_device()
    patcher = SequenceParallelPatcher(
        model,
        load_device=load_device,
        offload_device=comfy.model_management.unet_offload_device(),
        size=remote.weights.expected_bytes() if layout.uses(load_device.type, load_device.index) else 1,
    )
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "sequence_parallel", side_by_side)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "sequence_parallel", watched)
    return patcher


def _refuse_splits(network: str, config: SequenceParallelConfig) -> None:
    """Refuses settings that need a split plan, for a class without one.

    Raises:
        UnsupportedError: there is such a setting; the message names it.
    """
    asked = {name: getattr(config, name) for name in ("ulysses_degree", "ring_degree") if getattr(config, name) > 1}
    if config.weights in ("shard", "offload"):
        asked["weights"] = config.weights
    for name, value in asked.items():
        raise UnsupportedError(
            f"{name} is {value!r}, but {network} has no split plan: only prompts and samples of a batch run side by"
            f" side, with whole weights on each device. Set {name} to {'auto' if name == 'weights' else 0}"
        )


def _heads(detected: Detected) -> int:
    given = (detected.model_config.unet_config.get(name) for name in _HEADS)
    return min((count for count in given if isinstance(count, int) and count > 0), default=_ENOUGH)
