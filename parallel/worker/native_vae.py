"""ComfyUI's own VAE in a worker."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..comfyui.start import prepare
from ..errors import UnsupportedError
from ..vae.fingerprint import fingerprint, first_difference


class NativeVAE:
    """The network of a VAE, built by ComfyUI's class from the host's tensors.

    Args:
        source: `comfyui`, the folder of the host's ComfyUI; `arguments`, its parsed command line (see
            `vae.arguments`); `dtype` of the VAE; `fingerprint` of the host's network; `metadata`, in the form of a
            file's metadata, from which ComfyUI reads network settings.
        state: the host's state dict. On a CPU the network computes with these tensors; elsewhere it copies them.
        device: device that computes.

    Raises:
        UnsupportedError: ComfyUI cannot build the network in the worker, or builds a different one.
    """

    def __init__(self, source: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device):
        try:
            prepare(source["comfyui"], source["arguments"])
            sd = importlib.import_module("comfy.sd")
            dtype, metadata = getattr(torch, source["dtype"]), source["metadata"]
            vae = sd.VAE(sd=dict(state), device=device, dtype=dtype, metadata=metadata)
            if vae.first_stage_model is not None:
                vae.first_stage_model.load_state_dict(state, assign=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UnsupportedError(f"the workers cannot build this VAE: {type(error).__name__}: {error}") from error
        if vae.first_stage_model is None:
            raise UnsupportedError("the workers cannot build this VAE: ComfyUI does not recognise its tensors there")
        if difference := first_difference(source["fingerprint"], fingerprint(vae.first_stage_model)):
            raise UnsupportedError(f"the workers would build another VAE; {difference}")
        self._network = vae.first_stage_model.to(device)
        self._device = device
        self.nbytes = sum(tensor.nbytes for tensor in state.values())

    def run(self, direction: str, x: Tensor) -> Tensor:
        """Decodes or encodes one tile, with the same call as ComfyUI's tiled functions.

        Args:
            direction: `decode` or `encode`.
            x: [1, C, (T,) H, W] on the CPU, in the VAE's dtype.
        """
        with torch.inference_mode():
            call = {"decode": self._network.decode, "encode": self._network.encode}[direction]
            result: Tensor = call(x.to(self._device))
            return result
