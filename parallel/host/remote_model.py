"""A model in the workers, as the host holds it: its weights, its steps, whole samplings."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..cache.settings import CacheSettings
from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from ..plan import SequencePlan
from ..sampling.program import Program
from ..wire.shared import Segment, TensorRef, lay_out
from .cached_sampling import CachedSampling
from .compiled_sampling import CompiledSampling
from .group import Poll, Progress, WorkerGroup
from .recipe import Inspected, Recipe
from .remote_weights import RemoteWeights
from .sampling import OnStep, SampleReport, Sent
from .sent_conditioning import SentConditioning
from .step_request import StepRequest

log = logging.getLogger("sequence_parallel")


class RemoteModel(RemoteWeights):
    """A model that computes in the workers; see `RemoteWeights` for its arguments and its weights."""

    def __init__(self, recipe: Recipe, inspected: Inspected | None = None, group: WorkerGroup | None = None):
        super().__init__(recipe, inspected, group)
        self.last_step: list[dict[str, Any]] = []
        """What each rank said of the last step: `seconds` and the counters of `attention.traffic.Traffic`; with a cache
        also `cache`: `passes`, `hits` and `skipped_s` (`cache.blocks.Tally`), with compiled blocks `compile`
        (`compilation.compiler.Tally`)."""
        self._told_degrees: Degrees | None = None
        self._reason = ""
        self._conditioning = SentConditioning(self.name)

    def _forgotten(self) -> None:
        self._conditioning.clear()

    def forget(self, cache: CachedSampling) -> None:
        """Frees what the workers remember of a sampling, without waiting."""
        if self._group is not None and self.loaded:
            self._group.post("forget_cache", {"model": self.name, "sampling": cache.number})

    def rest(self) -> None:
        """After a sampling, without waiting: GPUs get back what its activations took."""
        if self._group is not None and self.loaded and self._layout.device_type == "cuda":
            self._group.post("rest", {})

    def check_cache(self, settings: CacheSettings) -> None:
        """Refuses a cache that cannot skip this family's blocks.

        Raises:
            UnsupportedError: naming both.
        """
        settings.rule(self.inspected.adapter.family, self.inspected.model_config)

    def check_compile(self, settings: CompileSettings) -> None:
        """Every family's blocks can be compiled, or run as they are."""

    def check(self, requests: Sequence[StepRequest], conditions: int = 1) -> None:
        """Everything that can be told of `steps` with these arguments before any work, and before there are weights.

        Raises:
            UnsupportedError: an input that the family cannot honour.
            ConfigError: more ranks than tokens.
        """
        inspected, degrees = self.inspected, self.degrees(conditions)
        for request in requests:
            inputs = {"x": request.x, "timestep": request.timestep, **request.conditioning}
            tokens = inspected.adapter.check_inputs(inspected.model_config, inputs)
            SequencePlan((tokens,), 1, (1.0,) * degrees.sp)

    def degrees(self, conditions: int) -> Degrees:
        """How a step with so many conditions is split; a change is logged."""
        heads = self.inspected.model_config["num_attention_heads"]
        sharded = (self.placement.mode if self.placement else self.recipe.config.weights) == "shard"
        degrees, self._reason = self._layout.degrees.choose(conditions=conditions, heads=heads, sharded=sharded)
        if degrees != self._told_degrees:
            self._told_degrees = degrees
            log.info("plan on %s: %s (%s)", self._layout.describe(), degrees, self._reason)
        return degrees

    def step(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], *, poll: Poll | None = None
    ) -> Tensor:
        """One request, see `steps`."""
        return self.steps([StepRequest(x, timestep, conditioning)], poll=poll)[0]

    def steps(
        self,
        requests: Sequence[StepRequest],
        *,
        conditions: int = 1,
        cache: CachedSampling | None = None,
        sigma: float = 1.0,
        compiled: CompiledSampling | None = None,
        poll: Poll | None = None,
    ) -> list[Tensor]:
        """The network's predictions for requests that may run side by side.

        Args:
            requests: each a call of the network.
            conditions: how many of cond and uncond are in the requests.
            cache: the sampling that this step is part of, if it may skip blocks.
            sigma: the step's, which decides whether it may.
            compiled: the sampling that this step is part of, if its blocks are to be compiled.
            poll: see `WorkerGroup.call`.

        Returns:
            The predictions, on x's device, in x's dtype.

        Raises:
            ConfigError, UnsupportedError: before any work.
            WorkerError: a worker failed; the weights are gone unless `loaded` still says otherwise.
        """
        self.check(requests, conditions)
        inspected, degrees = self.inspected, self.degrees(conditions)
        told = None
        if cache is not None:
            told = cache.message(sigma, inspected.adapter.family, inspected.model_config, requests[0].shapes)
        group = self._group
        assert group is not None, "call ensure_loaded first"
        group.settle(poll)
        inputs, outputs = [], []
        for request in requests:
            out_shape = inspected.adapter.output_shape(inspected.model_config, tuple(request.x.shape))
            inputs += [request.x, request.timestep]
            outputs.append((out_shape, request.x.dtype))
        in_refs, size = lay_out("step", [(tensor.shape, tensor.dtype) for tensor in inputs])
        segment = group.memory.segment("step", size)
        for tensor, ref in zip(inputs, in_refs, strict=True):
            segment.tensor(ref).copy_(tensor)
        results, out_refs, lend = group.memory.for_results(outputs)
        keys, put, drop = self._conditioning.update([request.conditioning for request in requests], group)
        plain = [
            {
                "x": x.to_json(),
                "timestep": timestep.to_json(),
                "out": out.to_json(),
                "conditioning": held,
                "label": label,
            }
            for x, timestep, out, held, label in zip(
                in_refs[::2], in_refs[1::2], out_refs, keys, (request.label for request in requests), strict=True
            )
        ]
        message = {
            "model": self.name,
            "degrees": asdict(degrees),
            "requests": plain,
            "put": put,
            "drop": drop,
            "cache": told,
            "compile": None if compiled is None else compiled.settings.to_json(),
        }
        try:
            self.last_step = group.call("step", message, poll=poll)
        except BaseException:
            self._begin_anew(cache)
            raise
        if cache is not None:
            cache.count(self.last_step, degrees)
        if compiled is not None:
            compiled.count(self.last_step)
        self._note_step(group, requests, degrees, cache, compiled, self.last_step)
        return [
            _hand_over(results, ref, request.x.device, lend) for ref, request in zip(out_refs, requests, strict=True)
        ]

    def _begin_anew(self, cache: CachedSampling | None) -> None:
        """After a Cancel or a failure: what the workers hold now is unknown, so it is sent, and remembered, again."""
        self._conditioning.clear()
        if cache is not None:
            self.forget(cache)
            cache.restart()

    def _note_step(
        self,
        group: WorkerGroup,
        requests: Sequence[StepRequest],
        degrees: Degrees,
        cache: CachedSampling | None,
        compiled: CompiledSampling | None,
        results: Sequence[Mapping[str, Any]],
    ) -> None:
        """For those who watch: what was computed, by how many."""
        recipe = self.recipe
        sizes = tuple(tuple(sorted(request.shapes.items())) for request in requests)
        how = (group.layout.attention, self._fp8, None if compiled is None else compiled.settings)
        work = (recipe.path, recipe.weight_dtype, recipe.compute_dtype, how, sizes)
        report = None if cache is None else cache.report.to_json()
        group.figures.stepped(work, degrees, self._reason, results, report)
        group.figures.self_checked(max(each["self_check_s"] for each in self.last_step))

    def check_sampling(self, program: Program) -> None:
        """As `check`, for every pass of a program."""
        seen = set()
        for network in program.networks:
            requests = [each.request for each in network.passes]
            kind = (network.conditions, *(tuple(sorted(request.shapes.items())) for request in requests))
            kind += tuple(id(tensor) for request in requests for tensor in request.conditioning.values())
            if kind not in seen:
                self.check(requests, network.conditions)
                seen.add(kind)

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
    ) -> tuple[Tensor, SampleReport]:
        """A whole sampling, for which each worker gets one message.

        Args:
            program: see `sampling.recording`.
            cache, compiled: as for `steps`.
            poll: see `WorkerGroup.call`.
            on_step: see `OnStep`. Without it, no latents are sent back before the end.
            interval_s: least seconds between two of its calls, but for the last one; 0: at every step.
            on_progress: told how many steps have been done, of all, where `on_step` is not.

        Returns:
            The result, on the program's device, in fp32.

        Raises:
            ConfigError, UnsupportedError: before any work.
            WorkerError: a worker failed; the weights are gone unless `loaded` still says otherwise.
        """
        self.check_sampling(program)
        inspected, networks = self.inspected, program.networks
        degrees = [self.degrees(network.conditions) for network in networks]
        passes = [each.request for network in networks for each in network.passes]
        told = None
        if cache is not None and passes:
            told = cache.message(0.0, inspected.adapter.family, inspected.model_config, passes[0].shapes)
        group = self._group
        assert group is not None, "call ensure_loaded first"
        group.settle(poll)
        sent = Sent(program, degrees, group.memory, with_previews=on_step is not None, interval_s=interval_s)
        kinds = [tuple((name, id(tensor)) for name, tensor in each.conditioning.items()) for each in passes]
        different = {kind: each.conditioning for kind, each in zip(kinds, passes, strict=True)}
        keys, put, drop = self._conditioning.update(list(different.values()), group)
        keys_of = dict(zip(different, keys, strict=True))
        plain = sent.message([keys_of[kind] for kind in kinds], cache)
        message = {
            "model": self.name,
            **plain,
            "put": put,
            "drop": drop,
            "cache": told,
            "compile": None if compiled is None else compiled.settings.to_json(),
        }
        before, began = group.messages, time.monotonic()
        try:
            results = group.call("sample", message, poll=poll, on_progress=sent.followed(on_step, on_progress))
        except BaseException:
            self._begin_anew(cache)
            raise
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
            self._note_step(group, requests, degrees[0], cache, compiled, per_call)
        result = sent.result()
        sent.clear()
        return result, report


def _hand_over(segment: Segment, ref: TensorRef, device: torch.device, lend: bool) -> Tensor:
    """A result that the next step cannot overwrite."""
    if device.type != "cpu":
        return segment.tensor(ref).to(device)
    return segment.lend(ref) if lend else segment.tensor(ref).clone()
