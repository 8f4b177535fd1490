"""Host side of a diffusion network in the workers: single steps, whole samplings, other methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Layout
from ..degrees import Degrees
from ..errors import WorkerError, WorkerOutOfMemoryError
from ..plan import share_of
from ..sampling.program import Program
from ..sampling.step_request import OF_ALL_SAMPLES, StepRequest
from ..wire import messages
from ..wire.shared import Segment, TensorRef
from ..wire.trees import Tree, flatten
from ..wire.trees import restore as restored
from ..wire.typed import from_plain
from .cached_sampling import CachedSampling
from .calls import Poll, Progress
from .compiled_sampling import CompiledSampling
from .group import WorkerGroup
from .not_finite import not_finite
from .recipe import Recipe
from .remote_weights import RemoteWeights
from .retry import Restore, Retry, announce
from .sampling import OUTPUT_DTYPE, OnStep, SampleReport, Sent
from .sent_conditioning import SentConditioning

log = logging.getLogger("sequence_parallel")

_NOTHING_NEW = messages.Conditioning(put={}, drop=[])
_ROOM = 1 << 20
"""Bytes of shared memory for a method's results; larger ones are collected by a second message."""


class RemoteModel:
    """Runs a model whose weights the workers hold.

    Args:
        recipe, group: see `RemoteWeights`.

    Attributes:
        weights: the model's weights in the workers; they must be loaded before anything is computed.
        last_step: each rank's result of the last step: `seconds` and the counters of `attention.traffic.Traffic`; with
            a cache also `cache`: `passes`, `hits` and `skipped_s` (`cache.blocks.Tally`); with compiled blocks also
            `compile` (`compilation.compiler.Tally`). After `sample`, of the whole sampling, with a list `degrees`
            of `seconds` and `cache` for each of its degrees.
        retry: decides whether a failed call is repeated when the workers are lost.

    Raises:
        ConfigError: the configuration does not fit this machine.
    """

    def __init__(self, recipe: Recipe, group: WorkerGroup | None = None):
        self.recipe = recipe
        self.weights = RemoteWeights(recipe, group)
        self.last_step: list[dict[str, Any]] = []
        self._told_degrees: Degrees | None = None
        self._reason = ""
        self._conditioning = SentConditioning(self.weights.name)
        self.retry = Retry(recipe.config)
        self.weights.on_change = self._conditioning.clear

    @property
    def name(self) -> str:
        """Name of the model in the workers."""
        return self.weights.name

    @property
    def _layout(self) -> Layout:
        return self.weights.layout

    def output_shape(self, request: StepRequest) -> tuple[int, ...]:
        """Returns the shape of a prediction: the latent's, without channels that a model class has appended to it."""
        shape, dim = list(request.x.shape), self.recipe.channels_dim
        if not request.parts:
            shape[dim] = min(shape[dim], self.recipe.channels)
        return tuple(shape)

    # --- calls ----------------------------------------------------------------------------------------------------

    def forget(self, cache: CachedSampling) -> None:
        """Frees the workers' cache of a sampling, without waiting."""
        self.weights.post(messages.ForgetCache(model=self.name, sampling=cache.number))

    def rest(self) -> None:
        """Releases the GPU memory of a finished sampling's activations, without waiting."""
        if self._layout.device_type == "cuda":
            self.weights.post(messages.Rest())

    def degrees(self, conditions: int, requests: Sequence[StepRequest] = ()) -> Degrees:
        """Returns the degrees that split a step with this number of conditions; logs a change."""
        degrees, self._reason = self._chosen(conditions, requests)
        if degrees != self._told_degrees:
            self._told_degrees = degrees
            log.info("plan on %s: %s (%s)", self._layout.describe(), degrees, self._reason)
        return degrees

    def _chosen(self, conditions: int, requests: Sequence[StepRequest]) -> tuple[Degrees, str]:
        """Returns the degrees and the reason; no batch groups if they would split a tensor that may not be a batch."""
        if not self.recipe.planned:
            degrees = Degrees(dp=self._layout.world_size)
            reason = f"{self.recipe.network} has no split plan: only prompts and samples of a batch run side by side"
        else:
            degrees, reason = self._layout.degrees.choose(
                conditions=conditions, heads=self.recipe.heads, sharded=self.weights.sharded
            )
        batches = [len(request.x) for request in requests]
        for group in range(degrees.groups if requests else 0):
            for request, rows in zip(requests, share_of(batches, group, degrees.groups), strict=True):
                if 0 < rows.stop - rows.start < len(request.x) and (name := _indivisible(request)):
                    return self._all_in_one(degrees), f"{name} cannot be taken apart by samples"
        return degrees, reason

    def _all_in_one(self, degrees: Degrees) -> Degrees:
        """Returns degrees under which all ranks share one sequence, with the same ring degree."""
        return Degrees(ring=degrees.ring, ulysses=self._layout.world_size // degrees.ring)

    def steps(
        self,
        requests: Sequence[StepRequest],
        *,
        conditions: int = 1,
        cache: CachedSampling | None = None,
        sigma: float = 1.0,
        compiled: CompiledSampling | None = None,
        poll: Poll | None = None,
        restore: Restore | None = None,
    ) -> list[Tensor]:
        """Returns the network's predictions for requests that may run side by side.

        Args:
            requests: calls of the network.
            conditions: number of conditions (cond, uncond) in the requests.
            cache: cache of the sampling to which this step belongs, if blocks may be skipped.
            sigma: sigma of the step, which decides whether the cache is active.
            compiled: state of the sampling to which this step belongs, if its blocks are to be compiled.
            poll: see `WorkerGroup.call`.
            restore: see `Retry.run`.

        Returns:
            The predictions, on x's device, in fp32.

        Raises:
            UnsupportedError: the cache does not support this model; raised before any work.
            NotFiniteError: a prediction has NaN or infinite values.
            WorkerError: a worker failed; the weights are lost unless `weights.loaded` is still True.
        """

        def attempt() -> list[Tensor]:
            return self._steps(requests, conditions, cache, sigma, compiled, poll)

        return self.retry.run(attempt, restore, f"the step{_beginning(cache)}")

    def _steps(
        self,
        requests: Sequence[StepRequest],
        conditions: int,
        cache: CachedSampling | None,
        sigma: float,
        compiled: CompiledSampling | None,
        poll: Poll | None,
    ) -> list[Tensor]:
        degrees = self.degrees(conditions, requests)
        told = None if cache is None else cache.message(sigma, self.recipe, requests[0].shapes)
        group = self.weights.settled(poll)
        in_refs = group.memory.write("step", [tensor for each in requests for tensor in (each.x, each.timestep)])
        outputs = [(self.output_shape(request), OUTPUT_DTYPE) for request in requests]
        results, out_refs, lend = group.memory.for_results(outputs)
        keys, conditioning = self._conditioning.update([request.conditioning for request in requests], group)
        message = messages.Step(
            model=self.name,
            degrees=degrees,
            requests=[
                request.message(x, timestep, out, held)
                for request, x, timestep, out, held in zip(
                    requests, in_refs[::2], in_refs[1::2], out_refs, keys, strict=True
                )
            ],
            conditioning=conditioning,
            cache=told,
            compile=None if compiled is None else compiled.settings,
        )
        self.last_step = self._ask(group, message, poll, cache)
        if not all(result["finite"] for result in self.last_step):
            watching = replace(message, conditioning=_NOTHING_NEW, cache=None, compile=None, watch=True)
            raise not_finite(group.workers, [each["where"] for each in self._ask(group, watching, poll, cache)])
        if cache is not None:
            cache.count(self.last_step, degrees)
        if compiled is not None:
            compiled.count(self.last_step)
        self._note_step(group, requests, degrees, cache, compiled, self.last_step)
        return [
            _hand_over(results, ref, request.x.device, lend) for ref, request in zip(out_refs, requests, strict=True)
        ]

    def _ask(
        self,
        group: WorkerGroup,
        message: messages.Operation,
        poll: Poll | None,
        cache: CachedSampling | None = None,
        on_progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Runs an operation and returns each rank's result. After a Cancel or a failure the state of the workers is
        unknown, so conditioning is sent again and the cache starts anew."""
        try:
            return group.call(message, poll=poll, on_progress=on_progress, advice=self.weights.advice)
        except BaseException as error:
            if isinstance(error, WorkerOutOfMemoryError):
                self.weights.ran_out()
            self._conditioning.clear()
            if cache is not None:
                self.forget(cache)
                cache.restart()
            raise

    def _note_step(
        self,
        group: WorkerGroup,
        requests: Sequence[StepRequest],
        degrees: Degrees,
        cache: CachedSampling | None,
        compiled: CompiledSampling | None,
        results: Sequence[Mapping[str, Any]],
    ) -> None:
        """Reports a step to the group's figures: sizes, degrees and results."""
        sizes = tuple(tuple(sorted(request.shapes.items())) for request in requests)
        model = (self.recipe.path, self.recipe.weight_dtype, self.weights.fp8)
        work = (model, group.layout.attention, None if compiled is None else compiled.settings, sizes)
        report = None if cache is None else cache.report.to_json()
        group.figures.stepped(work, degrees, self._reason, results, report)

    def sample(
        self,
        program: Program,
        *,
        cache: CachedSampling | None = None,
        compiled: CompiledSampling | None = None,
        poll: Poll | None = None,
        on_step: OnStep | None = None,
        interval_s: float = 0.0,
        on_progress: Progress | None = None,
        restore: Restore | None = None,
    ) -> tuple[Tensor, SampleReport]:
        """Runs a whole sampling, with one message to each worker.

        Args:
            program: see `sampling.recording`.
            cache, compiled: see `steps`.
            poll: see `WorkerGroup.call`.
            on_step: see `OnStep`. Without it, no latents are sent back before the end.
            interval_s: minimum seconds between two calls of `on_step`, except before the last one; 0: every step.
            on_progress: called with the number of steps done and of all steps, for steps that `on_step` is not.
            restore: see `Retry.run`; fresh workers continue after the last finished step.

        Returns:
            The result, on the program's device, in fp32, and a report.

        Raises:
            UnsupportedError: the cache does not support this model; raised before any work.
            NotFiniteError: a prediction has NaN or infinite values.
            WorkerError: a worker failed; the weights are lost unless `weights.loaded` is still True.
        """
        options = _SampleOptions(cache, compiled, poll, on_step, interval_s, on_progress)
        self._rule(program, cache)  # refuses before noise and constants are copied
        keep = restore is not None and self.retry.wanted
        left, resumed, began = program, 0, time.monotonic()
        while True:
            sent: Sent | None = None
            try:
                sent = self._sent(left, options, keep)
                result, report = self._sampled(left, sent, options)
                whole = sum(len(network.passes) for network in program.networks)
                return result, replace(report, passes=whole, seconds=time.monotonic() - began, resumed=resumed)
            except WorkerError as error:
                rest = left if sent is None else sent.rest()
                if restore is None or not self.retry.may_help(error) or (resumed and rest is left):
                    raise
                what = "the sampling" if rest is program else "what is left of the sampling"
                announce(error, f"{what}{_beginning(cache)}")
            left, resumed = rest, resumed + 1
            restore()

    def _sent(self, program: Program, options: _SampleOptions, keep: bool) -> Sent:
        networks = program.networks
        degrees = [self.degrees(network.conditions, [each.request for each in network.passes]) for network in networks]
        group = self.weights.settled(options.poll)
        previews = options.on_step is not None
        return Sent(
            program,
            degrees,
            group.memory,
            ranks=group.layout.world_size,
            with_previews=previews,
            interval_s=options.interval_s,
            keep=keep,
        )

    def _rule(self, program: Program, cache: CachedSampling | None) -> messages.CacheRule | None:
        """Returns the cache rule for a sampling; None without a cache or without a call of the network.

        Raises:
            UnsupportedError: the cache does not support this model.
        """
        requests = [each.request for network in program.networks for each in network.passes]
        if cache is None or not requests:
            return None
        return cache.message(0.0, self.recipe, requests[0].shapes)

    def _sampled(self, program: Program, sent: Sent, options: _SampleOptions) -> tuple[Tensor, SampleReport]:
        cache, compiled, poll = options.cache, options.compiled, options.poll
        networks, group = program.networks, self.weights.settled(poll)
        passes = [each.request for network in networks for each in network.passes]
        kinds = [tuple((name, id(tensor)) for name, tensor in each.conditioning.items()) for each in passes]
        different = {kind: each.conditioning for kind, each in zip(kinds, passes, strict=True)}
        keys, conditioning = self._conditioning.update(list(different.values()), group)
        keys_of = dict(zip(different, keys, strict=True))
        message = sent.message(
            self.name,
            [keys_of[kind] for kind in kinds],
            conditioning,
            is_active=lambda sigma: cache is not None and cache.is_active(sigma),
            cache=self._rule(program, cache),
            compiled=None if compiled is None else compiled.settings,
        )
        before, began = group.messages, time.monotonic()
        results = self._ask(group, message, poll, cache, sent.followed(options.on_step, options.on_progress))
        if found := [result["not_finite"] for result in results if "not_finite" in result]:
            sent.clear()
            done = sent.reported_before + found[0]["steps"]
            raise not_finite(group.workers, [each["where"] for each in found], f"{done} of {program.steps}")
        seconds = time.monotonic() - began
        report = SampleReport(program.steps, len(passes), group.messages - before, seconds, sent.previews)
        if cache is not None:
            for i, each in enumerate(sent.degrees):
                cache.count([result["degrees"][i] for result in results], each)
        if compiled is not None and networks:
            compiled.count(results)
        self.last_step = results
        if networks:
            requests = [each.request for each in networks[0].passes]
            n = len(networks)
            counted, timed = ("collectives", "bytes_sent"), ("seconds", "exposed_s", "copying_s")
            per_call = [
                {**{name: each[name] // n for name in counted}, **{name: each[name] / n for name in timed}}
                for each in results
            ]
            self._note_step(group, requests, sent.of_network[0], cache, compiled, per_call)
        result = sent.result()
        sent.clear()
        return result, report

    def call(
        self,
        method: str,
        args: Sequence[Any],
        named: Mapping[str, Any],
        *,
        poll: Poll | None = None,
        restore: Restore | None = None,
    ) -> Any:
        """Calls one of the network's methods that needs weights; returns its result on the first tensor's device.

        Args:
            method: one of the methods listed in the plans' module.
            args, named: positional and keyword arguments: nests of tensors and plain data.
            poll: see `WorkerGroup.call`.
            restore: see `Retry.run`.

        Raises:
            NotPlain: an argument is neither a tensor nor plain data; raised before any work.
            WorkerError: a worker failed; the weights are lost unless `weights.loaded` is still True.
        """
        tensors: dict[str, Tensor] = {}
        first = [flatten(value, str(i), tensors) for i, value in enumerate(args)]
        tree = {"dict": {"args": {"list": first}, "named": flatten(dict(named), "named", tensors)}}
        return self.retry.run(
            lambda: self._call(method, tree, tensors, poll), restore, f"{self.recipe.network}.{method}"
        )

    def _call(self, method: str, tree: Tree, tensors: dict[str, Tensor], poll: Poll | None) -> Any:
        group = self.weights.settled(poll)
        degrees = self._all_in_one(self._chosen(1, ())[0])
        (held,), conditioning = self._conditioning.update([tensors], group)
        room = messages.Room(segment="call-results", size=_ROOM)
        results = group.memory.segment(room.segment, room.size)
        message = messages.Call(
            model=self.name,
            method=method,
            degrees=degrees,
            arguments=tree,
            held=held,
            conditioning=conditioning,
            room=room,
        )
        told = self._ask(group, message, poll)[0]
        if told["needed"] > room.size:
            room = replace(room, size=told["needed"])
            results = group.memory.segment(room.segment, room.size)
            told |= self._ask(group, messages.Collect(model=self.name, room=room), poll)[0]
        device = next(iter(tensors.values())).device
        refs = [from_plain(TensorRef, ref) for ref in told["out"]]
        found = {str(i): results.tensor(ref).clone().to(device) for i, ref in enumerate(refs)}
        return restored(told["structure"], found.__getitem__)


@dataclass(frozen=True, slots=True)
class _SampleOptions:
    """Arguments of `RemoteModel.sample`."""

    cache: CachedSampling | None
    compiled: CompiledSampling | None
    poll: Poll | None
    on_step: OnStep | None
    interval_s: float
    on_progress: Progress | None


def _beginning(cache: CachedSampling | None) -> str:
    """Describes a cache's state on fresh workers, for a message; empty without a cache."""
    return "" if cache is None else f", with an empty {cache.settings.name},"


def _hand_over(segment: Segment, ref: TensorRef, device: torch.device, lend: bool) -> Tensor:
    """Returns a result that the next step cannot overwrite."""
    if device.type != "cpu":
        return segment.tensor(ref).to(device)
    return segment.lend(ref) if lend else segment.tensor(ref).clone()


def _indivisible(request: StepRequest) -> str:
    """Returns the name of the first tensor whose first dimension may not be the samples; empty if there is none.

    Tensors in lists are conditioning, with samples first, like all tensors that ComfyUI concatenates for a batch; those
    in a dictionary are made by the model itself.
    """
    for name, tensor in request.conditioning.items():
        if name in OF_ALL_SAMPLES:
            continue
        in_dictionary = any(not part.isdigit() for part in name.split(".")[1:])
        if tensor.ndim and len(tensor) not in ((1,) if in_dictionary else (1, len(request.x))):
            return name
    return ""
