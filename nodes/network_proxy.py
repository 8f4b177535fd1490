"""The stand-in for a network that runs in the workers under a split plan: all that ComfyUI reads of it, but no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ..parallel.host.remote_network import RemoteNetwork
from ..parallel.host.step_request import StepRequest
from ..parallel.plans.comfyui import METHODS, plan_of, takes_control
from ..parallel.sampling.recording import packed
from ..parallel.wire.trees import NotPlain, flatten
from .cached_call import label
from .options import travelling
from .proxy import RemoteProxy, add_parameters, ooms_as_comfyui
from .refusals import refuse_transformer_options, refuse_value

_MADE_ANEW = {"minimax_payload": "layout"}
"""Conditioning → what the network makes of it by itself where it is missing; its class cannot travel."""


class NetworkProxy(RemoteProxy):
    """Has the modules, parameters and attributes of ComfyUI's network, without data.

    Args:
        remote: the network in the workers.
        network: ComfyUI's, made on the meta device.
        parameters: what the file has, by the network's names, without data: layers of quantised files get their
            weights only when these are loaded, and LoRAs are matched by them.
    """

    remote: RemoteNetwork

    def __init__(self, remote: RemoteNetwork, network: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__(remote)
        self.__dict__["_network"] = network  # not a module of this one: its own are
        self._modules.update(network._modules)
        self._parameters.update(network._parameters)
        known = {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}
        add_parameters(self, {name: tensor for name, tensor in parameters.items() if name not in known})

    def __getattr__(self, name: str) -> Any:
        """Of the network: its sizes and patchifiers; methods that need weights run in the workers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_network")
            if network is None:
                raise
        if name in METHODS.get(type(network).__name__, ()):
            return partial(self._method, name)
        return getattr(network, name)

    def request(self, options: Mapping[str, Any], x: Any, timestep: Any, **conditioning: Any) -> StepRequest:
        refuse_transformer_options(options, allowed=("rope_options",))
        control = conditioning.get("control")
        if control is not None and not takes_control(plan_of(self.__dict__["_network"])):
            raise refuse_value("control", control)
        named = {name: value for name, value in conditioning.items() if value is not None}
        for name, part in _MADE_ANEW.items():
            if isinstance(named.get(name), Mapping):
                named[name] = {key: value for key, value in named[name].items() if key != part}
        latent, parts = packed([x] if isinstance(x, Tensor) else x)
        names = [{"tensor": f"x.{i}"} for i in range(len(parts))] or [{"tensor": "x"}]
        first = names[0] if isinstance(x, Tensor) else {"list": names}
        tensors: dict[str, Tensor] = {}
        with _refused_by_name():
            when = flatten(timestep, "timestep", tensors)
            rest = {name: flatten(value, name, tensors) for name, value in named.items()}
            rest["transformer_options"] = flatten(travelling(options), "transformer_options", tensors)
        one = tensors.pop("timestep", None)  # of nested ones each travels as what may stay
        return StepRequest(
            latent,
            torch.zeros(len(latent)) if one is None else one,
            tensors,
            label(options),
            {"dict": {"args": {"list": [first, when]}, "named": {"dict": rest}}},
            parts,
        )

    def _method(self, method: str, *args: Any, **named: Any) -> Any:
        with _refused_by_name(), ooms_as_comfyui():
            self.bring_weights()
            poll = comfy.model_management.throw_exception_if_processing_interrupted
            return self.remote.call(method, args, named, poll=poll)


@contextmanager
def _refused_by_name() -> Iterator[None]:
    """Says which value cannot travel."""
    try:
        yield
    except NotPlain as error:
        raise refuse_value(error.path.removeprefix("named."), error.value) from error
