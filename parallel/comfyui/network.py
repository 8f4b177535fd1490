"""A diffusion network of ComfyUI's own class in a worker, with the weights where the file maps them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.ldm.modules.attention
import torch
from torch import Tensor, nn

from .detection import Detected, detect, quantised_layers

log = logging.getLogger("sequence_parallel.worker")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total; may raise to stop."""


def load_network(path: str, weight_dtype: torch.dtype | None, device: torch.device, progress: Progress) -> nn.Module:
    """The network of a file on `device`, with ComfyUI's own operations.

    On a CPU its weights stay in the mapped file, which all workers share; only those whose dtype ComfyUI changes are
    copied.
    """
    detected = detect(path, weight_dtype, device)
    network = _empty(detected)
    tensors = _as_kept(detected, network)
    missing, unexpected = network.load_state_dict(tensors, strict=False, assign=True)
    if missing:
        log.warning("%s lacks %d tensors, e.g. %s", path, len(missing), ", ".join(missing[:3]))
    if unexpected:
        log.warning("%s has %d tensors too many, e.g. %s", path, len(unexpected), ", ".join(unexpected[:3]))
    network.requires_grad_(False)
    _move(network, device, progress)
    return network


def _empty(detected: Detected) -> nn.Module:
    """The network before its weights; the memory it asks for is never touched, so the system never gives it."""
    network = detected.model_config.get_model(dict(detected.state), "").diffusion_model
    assert isinstance(network, nn.Module)
    return network


def _as_kept(detected: Detected, network: nn.Module) -> dict[str, Tensor]:
    """The file's tensors, in the dtypes that the network was made with: assigned, they would keep the file's."""
    wanted = {name: tensor.dtype for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    tensors = detected.named_as_in_the_network()
    quantised = quantised_layers(tensors)
    kept = {}
    for name, tensor in tensors.items():
        dtype = wanted.get(name, tensor.dtype)
        layer = name[: name.rfind(".") + 1]
        plain = layer not in quantised and tensor.is_floating_point()
        kept[name] = tensor.to(dtype) if plain and tensor.dtype != dtype else tensor
    return kept


def _move(network: nn.Module, device: torch.device, progress: Progress) -> None:
    total = nbytes(network)
    done = 0
    for module in network.modules():
        own = sum(_nbytes(t) for t in [*module._parameters.values(), *module._buffers.values()] if t is not None)
        if device.type != "cpu":
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        done += own
        if own:
            progress(done, total)


def attention_name() -> str:
    """Of the attention function that ComfyUI has chosen: `sage` computes with 8 bits, all others exactly."""
    return "sage" if "sage" in comfy.ldm.modules.attention.optimized_attention.__name__ else "sdpa"


def nbytes(network: nn.Module) -> int:
    """Of its weights."""
    return sum(_nbytes(tensor) for tensor in [*network.parameters(), *network.buffers()])


def _nbytes(tensor: Tensor) -> int:
    """Of a quantised tensor, what it stores and its scales."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in inner()[0])
