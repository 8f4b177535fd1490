"""Detects a diffusion model's file as ComfyUI's own loader does. Only the header is read: the file is mapped."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..diffusers.tensors import mapped
from ..errors import CheckpointError, UnknownModelError
from ..headers import check_safetensors
from . import gguf
from .folders import in_comfyuis_names

_SVDQUANT = "SVDQuant (Nunchaku)"
_FOREIGN_FORMATS = {
    ".wscales": _SVDQUANT,
    ".smooth_factor": _SVDQUANT,
    ".qweight": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
}
"""Formats that ComfyUI does not know, by the suffixes of tensors that only they have; the first match counts."""
_ELSEWHERE = {_SVDQUANT: ", or the loader of the pack ComfyUI-nunchaku, which runs this one on one GPU"}


_CHOICE = ".comfy_attention.config"
"""Suffix of ComfyUI's name for the tensor that says which attention a module prefers."""


@dataclass(frozen=True, slots=True)
class Detected:
    """Result of ComfyUI's detection of a file."""

    model_config: Any
    """ComfyUI's `supported_models` entry, with the dtypes set."""
    state: dict[str, Tensor]
    """Tensors of the network, mapped, by the file's names without a prefix."""
    storage: torch.dtype
    """Dtype of weights that are not quantised."""
    checkpoint: dict[str, Tensor] = field(default_factory=dict)
    """All tensors of a checkpoint, by its own names: also text encoders and VAEs, and marks that decide how it is
    sampled."""
    prefix: str = ""
    """Prefix of the network's names in `checkpoint`."""
    is_gguf: bool = False
    path: str = ""

    def base_model(self, device: torch.device | None = None) -> Any:
        """Builds ComfyUI's `BaseModel` of the file, without weights."""
        return self.model_config.get_model(self.checkpoint or dict(self.state), self.prefix, device=device)

    @property
    def compute(self) -> torch.dtype:
        """Dtype of arithmetic, latents and conditioning."""
        return self.model_config.manual_cast_dtype or self.storage

    def named_as_in_the_network(self) -> dict[str, Tensor]:
        """Returns the tensors by the network's names; some may be built from several of the file's."""
        return {name: tensor for name, tensor in self._named().items() if not name.endswith(_CHOICE)}

    def attention_choices(self, network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
        """Finds the attention that the file chooses for modules, in JSON; newer ComfyUI's networks have a module for
        each.

        Returns:
            Choices by the network's names; names of choices without a module in it, as with an older ComfyUI.
        """
        if not any(name.endswith(_CHOICE) for name in self.state):
            return {}, []
        modules = dict(network.named_modules())
        found = {name: tensor for name, tensor in self._named().items() if name.endswith(_CHOICE)}
        homeless = [name for name in found if name.rpartition(".")[0] not in modules]
        return {name: tensor for name, tensor in found.items() if name not in homeless}, homeless

    def quantised_as(self) -> str:
        """Returns the formats of the file's quantised layers; empty if there are none. Reads their descriptions.

        Raises:
            CheckpointError: a description is damaged.
        """
        if self.is_gguf:
            return gguf.quantised_as(self.state.values())
        return ", ".join(sorted({self._format(f"{layer}{_QUANTISED}") for layer in quantised_layers(self.state)}))

    def _format(self, name: str) -> str:
        """Returns the format from the JSON in the tensor `name`; ComfyUI reads the same."""
        tensor = self.state[name]
        try:
            if tensor.nbytes > _LONGEST_DESCRIPTION:
                raise ValueError(f"it has {tensor.nbytes} bytes")
            return str(json.loads(tensor.numpy().tobytes()).get("format"))
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} does not say how its layer is quantised: {error}") from error

    def _named(self) -> dict[str, Tensor]:
        return dict(self.model_config.process_unet_state_dict(dict(self.state)))


def detect(
    path: str, weight_dtype: torch.dtype | None, device: torch.device, *, checkpoint: bool = False, pack: str = ""
) -> Detected:
    """Follows `comfy.sd.load_diffusion_model_state_dict` up to the choice of class and dtypes.

    Args:
        path: a safetensors or GGUF file, a diffusers folder that ComfyUI converts, or a diffusers folder of CogVideoX.
        weight_dtype: the user's choice; None leaves it to ComfyUI.
        device: device that the network will run on.
        pack: folder of ComfyUI-GGUF, for GGUF files: like its loader, this leaves marks of ComfyUI's own formats alone.
        checkpoint: follows `comfy.sd.load_state_dict_guess_config` instead, which also considers the tensors beside the
            network. The network is the same either way.

    Raises:
        CheckpointError: the file is damaged.
        UnknownModelError: ComfyUI does not recognise the model or its quantisation.
        UnsupportedError: a GGUF file, without a pack.
    """
    is_gguf = path.endswith(gguf.SUFFIX)
    state, metadata = (gguf.read(path, pack), None) if is_gguf else _read(path)
    foreign = (what for suffix, what in _FOREIGN_FORMATS.items() if any(name.endswith(suffix) for name in state))
    if what := next(foreign, ""):
        raise UnknownModelError(
            f"{path} is quantised as {what}, which this ComfyUI does not read; use the model's bf16, fp16, fp8 or int8"
            f" file{_ELSEWHERE.get(what, '')}"
        )
    whole: dict[str, Tensor] = {}
    prefix = ""
    sizes: dict[str, Any] = {}
    config = None
    try:
        if checkpoint:
            prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
            whole, told = comfy.utils.convert_old_quants(dict(state), prefix, metadata=metadata)
            config = comfy.model_detection.model_config_from_unet(whole, prefix, metadata=told)
        if config is not None:
            state = comfy.utils.state_dict_prefix_replace(dict(whole), {prefix: ""}, filter_keys=True)
        else:  # no checkpoint, or ComfyUI takes it for a diffusion model, too
            whole, prefix = {}, ""
            state, metadata = _of_a_network(state, metadata, convert=not is_gguf)
            if Path(path).is_dir() and (renamed := in_comfyuis_names(path, state)) is not None:
                state, sizes = renamed
            config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
        if config is None and (converted := comfy.model_detection.convert_diffusers_mmdit(state, "")) is not None:
            state = converted
            config = comfy.model_detection.model_config_from_unet(state, "")
    except Exception as error:  # on a file that only resembles one, ComfyUI's code looks up what is missing
        raise UnknownModelError(f"{path}: this ComfyUI's detection fails ({type(error).__name__}: {error})") from error
    if config is None:
        raise UnknownModelError(f"{path}: this ComfyUI does not recognise the model")
    config.unet_config.update(sizes)
    supported = list(config.supported_inference_dtypes)
    quantised = config.quant_config is not None
    storage = weight_dtype or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(state),
    )
    cast = comfy.model_management.unet_manual_cast(None if quantised else storage, device, supported)
    knows_device = "device" in inspect.signature(config.set_inference_dtype).parameters  # ComfyUI 0.28 and later
    config.set_inference_dtype(storage, cast, **({"device": device} if knows_device else {}))
    if is_gguf:
        config.custom_operations = gguf.operations(pack)
    return Detected(config, state, storage, whole, prefix, is_gguf, path)


def _of_a_network(state: dict[str, Tensor], metadata: Any, *, convert: bool) -> tuple[dict[str, Tensor], Any]:
    """Returns a diffusion model's tensors without a prefix, and the metadata.

    Args:
        convert: replaces marks of older quantised layouts.
    """
    if convert:
        state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    if network := comfy.utils.state_dict_prefix_replace(dict(state), {prefix: ""}, filter_keys=True):
        state = network
        if convert:
            state, metadata = comfy.utils.convert_old_quants(network, "", metadata=metadata)
    return state, metadata


def _read(path: str) -> tuple[dict[str, Tensor], Any]:
    """Returns the tensors, mapped, and the metadata.

    Raises:
        CheckpointError: the file is damaged.
    """
    if Path(path).is_dir():
        return mapped(path), None
    try:
        check_safetensors(Path(path))
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the file may be damaged or incomplete") from error
    return state, metadata


def quantised_layers(names: Iterable[str]) -> set[str]:
    """Returns the layers that the file has quantised, each with the dot that follows its name."""
    return {name.removesuffix(_QUANTISED) for name in names if name.endswith(f".{_QUANTISED}")}


_QUANTISED = "comfy_quant"
"""ComfyUI's name for the tensor that describes how a layer is quantised, in JSON."""
_LONGEST_DESCRIPTION = 1 << 16


def shapes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without their data, quantised ones with the shape of their values."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
