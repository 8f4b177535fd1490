"""ComfyUI's own MODEL around a network that runs in the workers under a split plan: families without an adapter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP

from ..parallel.checkpoints.source import Stored
from ..parallel.comfyui.detection import (
    Detected,
    computes_in_nvfp4,
    detect,
    quantised_as,
    quantised_layers,
    scaled_over_all_tokens,
    shapes,
)
from ..parallel.comfyui.network import changed_dtypes
from ..parallel.config import Layout, SequenceParallelConfig, resolve
from ..parallel.errors import UnsupportedError
from ..parallel.host.remote_network import NetworkRecipe, RemoteNetwork
from ..parallel.plans.comfyui import plan_of
from ..parallel.quantise.networks import linear_layers
from ..parallel.vae.arguments import as_plain
from .lora import patched_weight
from .network_proxy import NetworkProxy
from .refusals import refuse
from .shell_patcher import SequenceParallelPatcher
from .side_by_side import side_by_side
from .watching import watched

_HEADS = ("num_attention_heads", "audio_num_attention_heads", "num_heads", "n_heads", "heads")
"""What ComfyUI's networks call them."""
_ENOUGH = 1 << 10
"""Of a network that calls them otherwise."""


def load_planned_model(
    path: str, weight_dtype: torch.dtype | None, config: SequenceParallelConfig
) -> SequenceParallelPatcher:
    """A MODEL for a file that ComfyUI recognises and whose class has a plan. Starts no process and reads no weight.

    Raises:
        UnsupportedError: ComfyUI does not recognise the file, or its class has no plan.
        ConfigError: `config` asks for what such a network does not have yet.
    """
    layout = resolve(config)
    device = torch.device(layout.devices[0].name)
    detected = detect(path, weight_dtype, device)
    model = detected.model_config.get_model(dict(detected.state), "", device=torch.device("meta"))
    network = model.diffusion_model
    plan = plan_of(network)
    _refuse_scales(path, detected, layout)
    parameters = shapes(detected.named_as_in_the_network())
    changed = changed_dtypes(parameters, network)
    dtypes = {name: changed.get(name, tensor.dtype) for name, tensor in parameters.items()}
    quantised = quantised_as(detected.state)
    remote = RemoteNetwork(
        NetworkRecipe(
            path=path,
            weight_dtype=weight_dtype,
            network=type(network).__name__,
            comfyui=str(Path(comfy.sd.__file__).parent.parent),
            arguments=as_plain(vars(comfy.cli_args.args)),
            config=config,
            nbytes=sum(tensor.numel() * dtypes[name].itemsize for name, tensor in parameters.items()),
            in_the_file=sum(tensor.nbytes for name, tensor in parameters.items() if name not in changed),
            heads=_heads(detected),
            unet_config=dict(detected.model_config.unet_config),
            channels=model.latent_format.latent_channels,
            linear=() if quantised else tuple(linear_layers(network, plan, dtypes)),
            quantised=quantised,
        )
    )
    model.diffusion_model = NetworkProxy(remote, network, parameters)
    # Each device holds its share of the activations only; ComfyUI decides by this whether cond and uncond fit together.
    model.memory_usage_factor /= layout.world_size
    load_device = comfy.model_management.get_torch_device()
    patcher = PlannedPatcher(
        model,
        load_device=load_device,
        offload_device=comfy.model_management.unet_offload_device(),
        size=remote.expected_bytes() if layout.uses(load_device.type, load_device.index) else 1,
    )
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "sequence_parallel", side_by_side)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "sequence_parallel", watched)
    return patcher


def _refuse_scales(path: str, detected: Detected, layout: Layout) -> None:
    """A split must not change what a scale is taken over.

    Raises:
        UnsupportedError: naming the layer.
    """
    computes = any(computes_in_nvfp4(torch.device(device.name)) for device in layout.devices)
    if layout.world_size > 1 and computes and (layers := scaled_over_all_tokens(detected.state)):
        raise UnsupportedError(
            f"{path}: {len(layers)} layers, e.g. {layers[0]}, are nvfp4 without an input_scale: they scale their input"
            f" by its largest value over all tokens, and each of {layout.world_size} workers has only some. Use one"
            " device, or a file in another format (mxfp8, fp8, int8, bf16)"
        )


def _heads(detected: Detected) -> int:
    given = (detected.model_config.unet_config.get(name) for name in _HEADS)
    return min((count for count in given if isinstance(count, int) and count > 0), default=_ENOUGH)


class PlannedPatcher(SequenceParallelPatcher):
    """As its base; weights are named and replaced as the network has them."""

    def _replacement(self) -> tuple[Collection[str], Any]:
        """Patched weights are made of the file's, as ComfyUI would."""
        names = [key.removeprefix("diffusion_model.") for key in self.patches]
        if not names:
            return names, None
        recipe = self.remote.recipe
        detected = detect(recipe.path, recipe.weight_dtype, self.load_device)
        tensors = detected.named_as_in_the_network()
        quantised = quantised_layers(tensors)
        kept = {name: parameter.dtype for name, parameter in self.model.diffusion_model.named_parameters()}

        def patched(name: str) -> torch.Tensor:
            if name[: name.rfind(".") + 1] in quantised:
                raise refuse("a LoRA on a quantised file of this model", "use the bf16 file, or remove the LoRA")
            if name not in tensors:
                raise UnsupportedError(f"a LoRA changes {name}, which the file does not have")
            stored = Stored(tensors[name].to(kept[name]))
            return patched_weight(self.patches, f"diffusion_model.{name}", stored, self.load_device).tensor

        return names, patched
