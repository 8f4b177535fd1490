"""A whole sampling in the workers: ComfyUI's own sampler is recorded, then run where the network is.

ComfyUI prepares everything (sigmas, noise, conditioning, masks) and its sampler's code decides what happens at each
step; see `parallel.sampling.recording`. A sampling that cannot be recorded runs step by step, as in KSampler.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor
from tqdm.auto import tqdm

from ..parallel.errors import EngineError, WorkerOutOfMemoryError
from ..parallel.host.sampling import SampleReport
from ..parallel.sampling.program import Program
from ..parallel.sampling.recording import NotRecordable, Recorder
from .cached_call import COMPILED, SAMPLING
from .previews import Audience
from .refusals import node_of
from .shell_patcher import SequenceParallelPatcher

KEY = "sequence_parallel_sampler"
_OURS = frozenset({KEY, "sequence_parallel"})
"""Keys of the wrappers that this pack sets."""
_MOST_BYTES = 2 * 2**30
"""Largest noise of all steps together; host memory holds it twice. HunyuanVideo at 720p has 1.5 GB in 50 steps."""

_FUNCTIONS = (
    "sampler_calc_cond_batch_function",
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "model_function_wrapper",
    "denoise_mask_function",
)
_WRAPPERS = (
    WrappersMP.SAMPLER_SAMPLE,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)
_CONDITIONS = {
    "control": "ControlNet",
    "area": "conditioning for an area",
    "gligen": "GLIGEN",
    "hooks": "hooks on the conditioning",
}


class InWorkers:
    """A SAMPLER_SAMPLE wrapper, for one sampling.

    Attributes:
        told: message to the user about the sampling.
        report: figures of the sampling in the workers; None if it ran step by step.
        stepwise: message that it ran step by step, and why; empty if it did not.
    """

    def __init__(self) -> None:
        self.told = "nothing to do at denoise 0"
        self.report: SampleReport | None = None
        self.stepwise = ""

    def attach(self, model: SequenceParallelPatcher) -> SequenceParallelPatcher:
        """Returns a clone of the MODEL that samples in the workers."""
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self)
        return clone

    def __call__(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        try:
            _refuse_other_code(guider, extra_args["model_options"])
            audience = Audience(callback)
            program = _recorded(executor, guider, sigmas, extra_args, noise, latent_image, denoise_mask)
        except NotRecordable as reason:
            began = time.monotonic()
            result = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
            self.stepwise = f"sampled step by step, as by KSampler: {reason}"
            self.told = step_by_step(time.monotonic() - began, str(reason))
            return result
        options = extra_args["model_options"].get("transformer_options", {})
        result, report = _run(guider, program, options, audience, disable_pbar)
        self.report = report
        self.told = (
            f"{_counted(report.steps, 'step')} in the workers ({_counted(report.passes, 'network call')}), after"
            f" {_counted(report.messages, 'message')} to them: {report.seconds:.1f} s"
            f"{'; lost workers were replaced ' + _counted(report.resumed, 'time') if report.resumed else ''}"
        )
        return result


def step_by_step(seconds: float, reason: str) -> str:
    """Returns the message to the user about a sampling that ran step by step."""
    return f"sampled step by step, as by KSampler, in {seconds:.1f} s: {reason}"


def _recorded(
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    noise: Tensor,
    latent_image: Tensor | None,
    denoise_mask: Tensor | None,
) -> Program:
    """Records the sampling as a program. Leaves random generators as after the sampling, or unchanged on an error.

    Raises:
        NotRecordable: the sampling has to run step by step.
        UnsupportedError: it cannot run at all.
    """
    if noise.is_nested or latent_image is None:
        raise NotRecordable("the latent is in several parts that are not packed")
    poll = comfy.model_management.throw_exception_if_processing_interrupted

    def report(*shown: Any) -> None:
        poll()  # drawing the noise may take a while
        recorder.report(*shown)

    recorder = Recorder(noise.shape, noise.device, most_bytes=_MOST_BYTES)
    devices = [noise.device] if noise.device.type == "cuda" else []
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        result = executor(
            guider,
            sigmas.clone(),  # uni_pc writes to it
            dict(extra_args),
            report,
            recorder.given(noise),
            recorder.given(latent_image),
            denoise_mask,
            True,
        )
        return recorder.finish(result)
    except BaseException as error:
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        interrupted = comfy.model_management.InterruptProcessingException
        if isinstance(error, EngineError | interrupted) or not isinstance(error, Exception):
            raise
        # Whatever the error is: native sampling either raises it too, or is not affected by it.
        raise NotRecordable(f"the sampler cannot be recorded ({type(error).__name__}: {error})") from error


def _run(
    guider: Any, program: Program, options: Mapping[str, Any], audience: Audience, disable_pbar: bool
) -> tuple[Tensor, SampleReport]:
    network = guider.inner_model.diffusion_model
    with tqdm(total=program.steps, disable=disable_pbar) as bar:

        def on_step(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
            bar.update(step + 1 - bar.n)
            audience.show(step, denoised, x, steps)

        def on_progress(done: int, steps: int) -> None:
            bar.update(done - bar.n)
            audience.count(done, steps)

        try:
            network.bring_weights()
            result, report = network.remote.sample(
                program,
                cache=options.get(SAMPLING),
                compiled=options.get(COMPILED),
                poll=comfy.model_management.throw_exception_if_processing_interrupted,
                on_step=on_step if audience.wants_latents else None,
                interval_s=audience.interval_s,
                on_progress=on_progress,
                restore=network.restore_weights,
            )
        except WorkerOutOfMemoryError as error:
            # ComfyUI's own exception type, so that it frees memory and shows its advice.
            raise comfy.model_management.OOM_EXCEPTION(str(error)) from error
    return result, report


def _refuse_other_code(guider: Any, options: dict[str, Any]) -> None:
    """Refuses code of other nodes that runs at each step: it may keep state, so it is neither recorded nor run twice.

    Raises:
        NotRecordable: there is such code; the message names it.
    """
    for name in _FUNCTIONS:
        if value := options.get(name):
            names = {node_of(function) for function in (value if isinstance(value, list) else [value])}
            raise NotRecordable(f"code of {', '.join(sorted(names))} runs at every step ({name})")
    if options.get("context_handler") is not None:
        raise NotRecordable("context windows cut the latent into parts")
    if "multigpu_clones" in options:
        raise NotRecordable("MultiGPU CFG Split shares out the conditions")
    for kind in _WRAPPERS:
        if keys := _keys(options, kind):
            raise NotRecordable(f"code of {', '.join(keys)} runs at every step (a {kind} wrapper)")
    for conditions in guider.conds.values():
        for condition in conditions:
            for name, what in _CONDITIONS.items():
                if condition.get(name) is not None:
                    raise NotRecordable(f"the positive or negative prompt has {what}")


def _keys(options: dict[str, Any], kind: str) -> list[str]:
    """Returns the keys of wrappers that other nodes have set."""
    found: dict[str, Iterable[Any]] = options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    keys = sorted(str(key) for key, wrappers in found.items() if wrappers and key not in _OURS)
    ours = sum(len(list(found.get(key, []))) for key in _OURS)
    every = len(get_all_wrappers(kind, options, is_model_options=True))
    return keys or (["another node"] if every > ours else [])


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
