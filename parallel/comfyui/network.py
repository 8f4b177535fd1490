"""Diffusion network of ComfyUI's own class in a worker, whose weights stay where the file is mapped."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import comfy.ldm.modules.attention
import torch
from torch import Tensor, nn

from ..plans.comfyui import plan_of
from ..split.routes import ThroughOptions
from ..split.sites import Plan
from .attention import computes
from .detection import detect, quantised_layers

log = logging.getLogger("sequence_parallel.worker")


class NetworkFile:
    """A network's file, mapped.

    Attributes:
        attention: name in `attention.kernels` of the kernel that its attention computes with.

    Args:
        path: a safetensors or GGUF file.
        weight_dtype: the user's choice; None leaves it to ComfyUI.
        device: device that the network will run on.
        pack: folder of ComfyUI-GGUF, for GGUF files.

    Raises:
        UnknownModelError: ComfyUI does not recognise the file or its quantisation.
    """

    routes = ThroughOptions

    def __init__(self, path: str, weight_dtype: torch.dtype | None, device: torch.device, pack: str = ""):
        self.attention = computes(comfy.ldm.modules.attention.optimized_attention.__name__)
        self._path = path
        self._detected = detect(path, weight_dtype, device, pack=pack)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by the network's names; mapped, except those that ComfyUI builds from several of the
        file's."""
        return self._detected.named_as_in_the_network()

    def network(self) -> tuple[nn.Module, dict[str, torch.dtype]]:
        """Builds ComfyUI's network, with its own operations. Its parameters are the file's mapped tensors, without a
        copy.

        Returns:
            The network; name of a parameter → dtype in which ComfyUI keeps it, if that is not the file's.
        """
        # Built before its weights: the memory that it allocates is never touched, so the system never commits it.
        network = self._detected.base_model().diffusion_model
        assert isinstance(network, nn.Module)
        tensors = self.tensors()
        parameters = {name for name, _ in network.named_parameters()}
        dtypes = changed_dtypes(tensors, network)
        for name in dtypes.keys() - parameters:  # buffers, which are few and small
            tensors[name] = tensors[name].to(dtypes.pop(name))
        choices, _ = self._detected.attention_choices(network)  # no parameters: their modules read them
        missing, unexpected = network.load_state_dict(tensors | choices, strict=False, assign=True)
        if missing:
            log.warning("%s lacks %d tensors, e.g. %s", self._path, len(missing), ", ".join(missing[:3]))
        if unexpected:
            log.warning("%s has %d tensors too many, e.g. %s", self._path, len(unexpected), ", ".join(unexpected[:3]))
        return network.requires_grad_(False), dtypes

    def plan(self, network: nn.Module) -> Plan:
        """Returns the plan of the network's class; empty if it has none."""
        return plan_of(network)


def changed_dtypes(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, torch.dtype]:
    """Returns the tensors of a file that ComfyUI keeps in another dtype, the one that the network was built with. If
    they were assigned as they are, they would keep the file's dtype.

    Args:
        tensors: the file's tensors, by the network's names; they need no data.
        network: without weights, on any device.
    """
    wanted = {name: tensor.dtype for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    for path, module in network.named_modules():  # in ComfyUI's own process some create parameters on loading
        for leaf in ("weight", "bias"):
            if (later := getattr(module, f"{leaf}_comfy_model_dtype", None)) is not None:
                wanted.setdefault(f"{path}.{leaf}", later)
    quantised = quantised_layers(tensors)
    found = {}
    for name, tensor in tensors.items():
        dtype = wanted.get(name, tensor.dtype)
        plain = name[: name.rfind(".") + 1] not in quantised and tensor.is_floating_point()
        if plain and tensor.dtype != dtype:
            found[name] = dtype
    return found
