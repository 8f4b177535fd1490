"""The stand-in for ComfyUI's network: parameters without data, and a forward that runs in the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier
from torch import Tensor, nn

from ..parallel.adapters.base import pack_text
from ..parallel.errors import WorkerOutOfMemoryError
from ..parallel.host.remote_model import RemoteModel
from ..parallel.host.step_request import StepRequest
from ..parallel.sampling.recording import RecordedLatent
from .cached_call import cached_sampling, compiled_sampling, label
from .refusals import refuse_transformer_options, refuse_value
from .side_by_side import LookAhead, Recorded

_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "ltxv": {"patchifier": SymmetricPatchifier(1, start_end=True)},
}
"""What ComfyUI's model class of a family (its `image_model`) reads of the network, beside the sizes."""


class ProxyDiffusionModel(nn.Module):
    """Has the parameter names and the few attributes that ComfyUI and its nodes read; computes nothing here.

    Args:
        remote: the model in the workers.
        parameters: ComfyUI's names → tensors on the meta device.
        unet_config: as ComfyUI's detection found it; its values can be read as attributes.
        dtype: of the weights, as ComfyUI chose it.
        checkpoint_names: ComfyUI's names → names of the checkpoint (`NativeTensors`).
    """

    def __init__(
        self,
        remote: RemoteModel,
        parameters: Mapping[str, Tensor],
        unet_config: Mapping[str, Any],
        dtype: torch.dtype,
        checkpoint_names: Mapping[str, str],
    ):
        super().__init__()
        self.remote = remote
        self.dtype = dtype
        self.checkpoint_names = checkpoint_names
        self.look_ahead = LookAhead(remote)
        self.load_weights: Callable[[], None] | None = None
        """Set when ComfyUI loads the model, and run by the next step, once its inputs have been checked."""
        for name in ("in_channels", "out_channels", "patch_size", "hidden_size", "num_heads"):
            if name in unet_config:
                setattr(self, name, unet_config[name])
        self.ofs_proj_dim = unet_config.get("ofs_embed_dim")  # CogVideoX
        for name, value in _ATTRIBUTES.get(unet_config.get("image_model", ""), {}).items():
            setattr(self, name, value)
        add_parameters(self, parameters)

    @torch.compiler.disable
    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conditioning: Any,
    ) -> Tensor:
        """As ComfyUI's networks: called by `BaseModel`, runs the wrappers that nodes such as EasyCache have set."""
        options = {} if transformer_options is None else transformer_options
        if isinstance(x, RecordedLatent):
            return self._record(options, x, timestep, context=context, control=control, **conditioning)
        if self.look_ahead.recording:
            raise Recorded(self._request(options, x, timestep, context=context, control=control, **conditioning))
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **conditioning)

    def bring_weights(self) -> None:
        """What ComfyUI's loading of the model has left to be done, once it is known that the inputs are good."""
        if self.load_weights is not None:
            load, self.load_weights = self.load_weights, None
            load()

    def _record(self, options: dict[str, Any], x: RecordedLatent, timestep: Tensor, **conditioning: Any) -> Tensor:
        """A call that the workers will make by themselves."""
        refuse_transformer_options(options)
        request = self._request(options, x, timestep, **conditioning)
        inspected = self.remote.inspected
        return x.recorder.network(
            request,
            inspected.adapter.output_shape(inspected.model_config, tuple(x.shape)),
            conditions=frozenset(options.get("cond_or_uncond", [0])),
            sigma=float(options["sigmas"][0]) if options.get("sigmas") is not None else 1.0,
        )

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        **conditioning: Any,
    ) -> Tensor:
        refuse_transformer_options(transformer_options)
        request = self._request(transformer_options, x, timestep, context=context, control=control, **conditioning)
        if (early := self.look_ahead.take(request)) is not None:
            return early
        running = transformer_options.get("cond_or_uncond", [0])
        requests = [request, *self.look_ahead.others(running)]
        conditions = len(set(running)) + len(requests) - 1
        cache, sigma = cached_sampling(transformer_options)
        try:
            self.remote.check(requests, conditions)
            self.bring_weights()
            predictions = self.remote.steps(
                requests,
                conditions=conditions,
                cache=cache,
                sigma=sigma,
                compiled=compiled_sampling(transformer_options),
                poll=comfy.model_management.throw_exception_if_processing_interrupted,
            )
        except WorkerOutOfMemoryError as error:
            # ComfyUI's own kind, so that it frees memory and shows its advice.
            raise comfy.model_management.OOM_EXCEPTION(str(error)) from error
        self.look_ahead.keep(requests[1:], predictions[1:])
        return predictions[0]

    @staticmethod
    def _request(options: Mapping[str, Any], x: Tensor, timestep: Tensor, **conditioning: Any) -> StepRequest:
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
