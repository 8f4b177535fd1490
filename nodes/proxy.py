"""The stand-in for ComfyUI's network: all that ComfyUI and its nodes read from it, without data, and a forward that
runs in the workers."""

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
"""Maps a conditioning to its entry that the network recreates if missing; the entry's class cannot be sent."""


class ProxyDiffusionModel(nn.Module):
    """Module with the submodules, parameters and attributes of ComfyUI's network, without data; runs in the workers.

    Args:
        remote: the model in the workers.
        network: ComfyUI's network, made on the meta device.
        parameters: the file's tensors by the network's names, without data. LoRAs are matched by these names, and
            layers of quantised files get their own weights only when they are loaded.
    """

    def __init__(self, remote: RemoteModel, network: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.remote = remote
        self.look_ahead = LookAhead(remote)
        self.load_weights: Callable[[], None] | None = None
        """Function that loads the weights: set when ComfyUI loads the model, called by the next step."""
        self.restore_weights: Callable[[], None] | None = None
        """Function that loads the weights into fresh workers in the middle of a sampling; set likewise."""
        self.__dict__["_network"] = network  # no submodule; the network's own submodules are
        self._modules.update(network._modules)
        self._parameters.update(network._parameters)
        known = {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}
        add_parameters(self, {name: tensor for name, tensor in parameters.items() if name not in known})

    def __getattr__(self, name: str) -> Any:
        """Reads the network's attributes, e.g. sizes and patchifiers; methods that need weights run in the workers."""
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
        """Runs the wrappers that nodes such as EasyCache have set, as in ComfyUI's networks; `BaseModel` calls it."""
        options = {} if transformer_options is None else transformer_options
        if (recorder := recorder_of(x)) is not None:
            return self._record(recorder, options, x, timestep, context=context, control=control, **conditioning)
        if self.look_ahead.recording:
            raise Recorded(self.request(options, x, timestep, context=context, control=control, **conditioning))
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **conditioning)

    def bring_weights(self) -> None:
        """Completes ComfyUI's loading of the model, which was deferred until the inputs had been accepted."""
        if self.load_weights is not None:
            load, self.load_weights = self.load_weights, None
            load()

    def _record(
        self, recorder: Recorder, options: dict[str, Any], x: Any, timestep: Any, **conditioning: Any
    ) -> RecordedLatent | list[RecordedPart]:
        """Records a network call, which the workers will later make by themselves."""
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
        """Builds the request to the workers for one network call.

        Args:
            options: `transformer_options`.
            x: the latent, which may be a recorded one, or the list of its parts.
            conditioning: `context`, `control` and all other arguments that ComfyUI's model class passes to its network.

        Raises:
            UnsupportedError: an input cannot be sent to the workers; the message names it.
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
        one = tensors.pop("timestep", None)  # nested timesteps are sent as conditioning, which workers may keep
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
    """Converts workers' out-of-memory errors to ComfyUI's own, so that it frees memory and shows its advice."""
    try:
        yield
    except WorkerOutOfMemoryError as error:
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error


@contextmanager
def _refused_by_name() -> Iterator[None]:
    """Converts NotPlain to an error that names the value that cannot be sent."""
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
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))  # some layers have a plain attribute here


class Part(nn.Module):
    """A module without a forward; nodes may index it where ComfyUI's network has a list of blocks."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))
