"""The stand-in for a network that runs in the workers under a split plan: all that ComfyUI reads of it, but no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ..parallel.errors import WorkerOutOfMemoryError
from ..parallel.host.compiled_sampling import CompiledSampling
from ..parallel.host.remote_network import RemoteNetwork
from ..parallel.plans.comfyui import METHODS, plan_of, takes_control
from ..parallel.sampling.recording import NotRecordable, RecordedLatent
from ..parallel.wire.trees import NotPlain
from .cached_call import compiled_sampling
from .options import travelling
from .proxy import add_parameters
from .refusals import refuse_transformer_options, refuse_value
from .side_by_side import LookAhead

_CHANGING = 2
"""Latent and timestep are other ones at each step."""
_MADE_ANEW = {"minimax_payload": "layout"}
"""Conditioning → what the network makes of it by itself where it is missing; its class cannot travel."""


class NetworkProxy(nn.Module):
    """Has the modules, parameters and attributes of ComfyUI's network, without data; computes in the workers.

    Args:
        remote: the network in the workers.
        network: ComfyUI's, made on the meta device.
        parameters: what the file has, by the network's names, without data: layers of quantised files get their
            weights only when these are loaded, and LoRAs are matched by them.
    """

    def __init__(self, remote: RemoteNetwork, network: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.remote = remote
        self.look_ahead = LookAhead(remote)
        self.load_weights: Callable[[], None] | None = None
        """Set when ComfyUI loads the model, and run by the next call."""
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
            return partial(self._remotely, name)
        return getattr(network, name)

    @torch.compiler.disable
    def forward(
        self,
        x: Tensor | list[Tensor],
        timestep: Any,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conditioning: Any,
    ) -> Any:
        """As ComfyUI's networks: called by `BaseModel`, runs the wrappers that nodes such as EasyCache have set."""
        if isinstance(x, RecordedLatent):
            raise NotRecordable(f"{self.remote.recipe.network} is sampled step by step so far")
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **conditioning)

    def bring_weights(self) -> None:
        """What ComfyUI's loading of the model has left to be done."""
        if self.load_weights is not None:
            load, self.load_weights = self.load_weights, None
            load()

    def _forward(
        self,
        x: Tensor | list[Tensor],
        timestep: Any,
        context: Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        **conditioning: Any,
    ) -> Any:
        refuse_transformer_options(transformer_options, allowed=("rope_options",))
        if control is not None and not takes_control(plan_of(self.__dict__["_network"])):
            raise refuse_value("control", control)
        named = {"context": context, "control": control, **conditioning}
        for name, part in _MADE_ANEW.items():
            if isinstance(named.get(name), Mapping):
                named[name] = {key: value for key, value in named[name].items() if key != part}
        named = {name: value for name, value in named.items() if value is not None}
        named["transformer_options"] = travelling(transformer_options)
        compiled = compiled_sampling(transformer_options)
        return self._remotely("forward", x, timestep, changing=_CHANGING, compiled=compiled, **named)

    def _remotely(
        self, method: str, *args: Any, changing: int = 0, compiled: CompiledSampling | None = None, **named: Any
    ) -> Any:
        try:
            self.bring_weights()
            return self.remote.call(
                method,
                args,
                named,
                changing=changing,
                compiled=compiled,
                poll=comfy.model_management.throw_exception_if_processing_interrupted,
            )
        except NotPlain as error:
            raise refuse_value(error.path.removeprefix("named."), error.value) from error
        except WorkerOutOfMemoryError as error:
            # ComfyUI's own kind, so that it frees memory and shows its advice.
            raise comfy.model_management.OOM_EXCEPTION(str(error)) from error
