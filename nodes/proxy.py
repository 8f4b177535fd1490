"""The stand-in for ComfyUI's network: all that ComfyUI and its nodes read of it, without data, and a forward that runs
in the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor, nn

from ..parallel.errors import WorkerOutOfMemoryError
from ..parallel.host.remote_model import RemoteModel
from ..parallel.plans.comfyui import BY_HALVES, METHODS, handed_on, plan_of, takes_control
from ..parallel.sampling.recording import RecordedLatent, RecordedPart, Recorder, in_parts, packed, recorder_of
from ..parallel.sampling.step_request import StepRequest
from ..parallel.split.routes import REPLACED
from ..parallel.wire.trees import NotPlain, flatten
from .cached_call import cached_sampling, compiled_sampling, label
from .options import as_data, travelling
from .refusals import refuse, refuse_skipping, refuse_transformer_options, refuse_value
from .side_by_side import LookAhead, Recorded

_MADE_ANEW = {"minimax_payload": "layout"}
"""Conditioning → what the network makes of it by itself where it is missing; its class cannot travel."""


class ProxyDiffusionModel(nn.Module):
    """Has the modules, parameters and attributes of ComfyUI's network, without data, and computes in the workers.

    Args:
        remote: the model in the workers.
        network: ComfyUI's, made on the meta device.
        parameters: what the file has, by the network's names, without data: layers of quantised files get their
            weights only when these are loaded, and LoRAs are matched by them.
    """

    def __init__(self, remote: RemoteModel, network: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.remote = remote
        self.look_ahead = LookAhead(remote)
        self.load_weights: Callable[[], None] | None = None
        """Set when ComfyUI loads the model, and run by the next step."""
        self.restore_weights: Callable[[], None] | None = None
        """Likewise; brings them to fresh workers in the middle of a sampling."""
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

    @torch.compiler.disable
    def forward(
        self,
        x: Any,
        timestep: Any,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conditioning: Any,
    ) -> Any:
        """As ComfyUI's networks: called by `BaseModel`, runs the wrappers that nodes such as EasyCache have set."""
        options = {} if transformer_options is None else transformer_options
        if (recorder := recorder_of(x)) is not None:
            return self._record(recorder, options, x, timestep, context=context, control=control, **conditioning)
        if self.look_ahead.recording:
            raise Recorded(self.request(options, x, timestep, context=context, control=control, **conditioning))
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **conditioning)

    def bring_weights(self) -> None:
        """What ComfyUI's loading of the model has left to be done, once it is known that the inputs are good."""
        if self.load_weights is not None:
            load, self.load_weights = self.load_weights, None
            load()

    def _record(
        self, recorder: Recorder, options: dict[str, Any], x: Any, timestep: Any, **conditioning: Any
    ) -> RecordedLatent | list[RecordedPart]:
        """A call that the workers will make by themselves."""
        request = self.request(options, x, timestep, **conditioning)
        prediction = recorder.network(
            request,
            self.remote.output_shape(request),
            conditions=frozenset(options.get("cond_or_uncond", [0])),
            sigma=float(options["sigmas"][0]) if options.get("sigmas") is not None else 1.0,
        )
        return in_parts(prediction, request.parts) if request.parts else prediction

    def _forward(
        self,
        x: Any,
        timestep: Any,
        context: Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        **conditioning: Any,
    ) -> Any:
        request = self.request(transformer_options, x, timestep, context=context, control=control, **conditioning)
        if (prediction := self.look_ahead.take(request)) is None:
            prediction = self._predicted(transformer_options, request)
        return (
            comfy.utils.unpack_latents(prediction, [(0, *part) for part in request.parts])
            if request.parts
            else prediction
        )

    def _predicted(self, options: dict[str, Any], request: StepRequest) -> Tensor:
        running = options.get("cond_or_uncond", [0])
        requests = [request, *self.look_ahead.others(running)]
        conditions = len(set(running)) + len(requests) - 1
        cache, sigma = cached_sampling(options)
        with ooms_as_comfyui():
            self.bring_weights()
            predictions = self.remote.steps(
                requests,
                conditions=conditions,
                cache=cache,
                sigma=sigma,
                compiled=compiled_sampling(options),
                poll=comfy.model_management.throw_exception_if_processing_interrupted,
                restore=self.restore_weights,
            )
        self.look_ahead.keep(requests[1:], predictions[1:])
        return predictions[0]

    def request(self, options: Mapping[str, Any], x: Any, timestep: Any, **conditioning: Any) -> StepRequest:
        """A call of the network, for the workers.

        Args:
            options: `transformer_options`.
            x: the latent, which may be recorded, or the list of its parts.
            conditioning: `context`, `control` and whatever else ComfyUI's model class hands to its network.

        Raises:
            UnsupportedError: an input that cannot reach the workers; it is named.
        """
        refuse_transformer_options(options)
        network = self.__dict__["_network"]
        plan, control = plan_of(network), conditioning.get("control")
        if plan and as_data(options).get(REPLACED):
            refuse_skipping(options[REPLACED], handed_on(type(network).__name__), cached_sampling(options)[0])
        if control is not None and not takes_control(plan):
            raise refuse_value("control", control)
        if type(network).__name__ in BY_HALVES and len(set(options.get("cond_or_uncond", ()))) > 1:
            raise refuse("one prompt as positive and as negative, with this model,", "set cfg to 1")
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
            {"dict": {"args": {"list": [first, when]}, "named": {"dict": rest}}},
            label(options),
            parts,
        )

    def _method(self, method: str, *args: Any, **named: Any) -> Any:
        with _refused_by_name(), ooms_as_comfyui():
            self.bring_weights()
            poll = comfy.model_management.throw_exception_if_processing_interrupted
            return self.remote.call(method, args, named, poll=poll, restore=self.restore_weights)


@contextmanager
def ooms_as_comfyui() -> Iterator[None]:
    """Workers without memory raise ComfyUI's own kind, so that it frees memory and shows its advice."""
    try:
        yield
    except WorkerOutOfMemoryError as error:
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error


@contextmanager
def _refused_by_name() -> Iterator[None]:
    """Says which value cannot travel."""
    try:
        yield
    except NotPlain as error:
        raise refuse_value(error.path.removeprefix("named."), error.value) from error


def add_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Registers tensors under dotted names, with a module for every part of a name."""
    for name, tensor in parameters.items():
        *path, leaf = name.split(".")
        parent = module
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, Part())
            parent = parent._modules[part]  # type: ignore[assignment]
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))  # some layers have it as an attribute so far


class Part(nn.Module):
    """A module without a forward; nodes may index it where ComfyUI's network has a list of blocks."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))
