"""The stand-in for ComfyUI's network: parameters without data, and a forward that runs in the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier
from torch import Tensor, nn

from ..parallel.adapters.base import pack_text
from ..parallel.errors import WorkerOutOfMemoryError
from ..parallel.host.remote_model import RemoteModel
from ..parallel.host.remote_transformer import RemoteTransformer
from ..parallel.host.step_request import StepRequest
from ..parallel.sampling.recording import RecordedLatent, RecordedPart, Recorder, in_parts, recorder_of
from .cached_call import cached_sampling, compiled_sampling, label
from .refusals import refuse_transformer_options, refuse_value
from .side_by_side import LookAhead, Recorded

_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "ltxv": {"patchifier": SymmetricPatchifier(1, start_end=True)},
}
"""What ComfyUI's model class of a family (its `image_model`) reads of the network, beside the sizes."""


class RemoteProxy(nn.Module, ABC):
    """What stands in ComfyUI's MODEL for its network, and computes in the workers.

    Args:
        remote: the model in the workers.
    """

    remote: RemoteTransformer

    def __init__(self, remote: RemoteTransformer):
        super().__init__()
        self.remote = remote
        self.look_ahead = LookAhead(remote)
        self.load_weights: Callable[[], None] | None = None
        """Set when ComfyUI loads the model, and run by the next step, once its inputs have been checked."""

    @abstractmethod
    def request(self, options: Mapping[str, Any], x: Any, timestep: Any, **conditioning: Any) -> StepRequest:
        """A call of the network, for the workers.

        Args:
            options: `transformer_options`.
            x: the latent, which may be recorded, or the list of its parts.
            conditioning: `context`, `control` and whatever else ComfyUI's model class hands to its network.

        Raises:
            UnsupportedError: an input that cannot reach the workers; it is named.
        """

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
            self.remote.check(requests, conditions)
            self.bring_weights()
            predictions = self.remote.steps(
                requests,
                conditions=conditions,
                cache=cache,
                sigma=sigma,
                compiled=compiled_sampling(options),
                poll=comfy.model_management.throw_exception_if_processing_interrupted,
            )
        self.look_ahead.keep(requests[1:], predictions[1:])
        return predictions[0]


@contextmanager
def ooms_as_comfyui() -> Iterator[None]:
    """Workers without memory raise ComfyUI's own kind, so that it frees memory and shows its advice."""
    try:
        yield
    except WorkerOutOfMemoryError as error:
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error


class ProxyDiffusionModel(RemoteProxy):
    """Has the parameter names and the few attributes that ComfyUI and its nodes read; computes nothing here.

    Args:
        remote: the model in the workers.
        parameters: ComfyUI's names → tensors on the meta device.
        unet_config: as ComfyUI's detection found it; its values can be read as attributes.
        dtype: of the weights, as ComfyUI chose it.
        checkpoint_names: ComfyUI's names → names of the checkpoint (`NativeTensors`).
    """

    remote: RemoteModel

    def __init__(
        self,
        remote: RemoteModel,
        parameters: Mapping[str, Tensor],
        unet_config: Mapping[str, Any],
        dtype: torch.dtype,
        checkpoint_names: Mapping[str, str],
    ):
        super().__init__(remote)
        self.dtype = dtype
        self.checkpoint_names = checkpoint_names
        for name in ("in_channels", "out_channels", "patch_size", "hidden_size", "num_heads"):
            if name in unet_config:
                setattr(self, name, unet_config[name])
        self.ofs_proj_dim = unet_config.get("ofs_embed_dim")  # CogVideoX
        for name, value in _ATTRIBUTES.get(unet_config.get("image_model", ""), {}).items():
            setattr(self, name, value)
        add_parameters(self, parameters)

    def request(self, options: Mapping[str, Any], x: Tensor, timestep: Tensor, **conditioning: Any) -> StepRequest:
        refuse_transformer_options(options)
        tensors: dict[str, Tensor] = {}
        for name, value in conditioning.items():
            if value is None:
                continue
            if isinstance(value, str | int | float):
                tensors[name] = pack_text(str(value))
                continue
            parts = {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
            if not parts or not all(isinstance(part, Tensor) for part in parts.values()):
                raise refuse_value(name, value)
            tensors |= parts
        return StepRequest(x, timestep, tensors, label(options))


def add_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Registers tensors under dotted names, with a module for every part of a name."""
    for name, tensor in parameters.items():
        *path, leaf = name.split(".")
        parent = module
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, Part())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


class Part(nn.Module):
    """A module without a forward; nodes may index it where ComfyUI's network has a list of blocks."""

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))
