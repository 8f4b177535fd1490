"""A model in the workers, as the host holds it: load, step, unload."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..adapters.native import NativeTensors
from ..checkpoints.source import Stored
from ..config import resolve
from ..degrees import Degrees
from ..errors import WorkerError
from ..placement import Memory, Placement, bytes_on_device, choose, has_fsdp2
from ..plan import SequencePlan
from ..quantise.selection import Selection, select
from ..quantise.settings import (
    FP8Choice,
    FP8Report,
    FP8Settings,
    choose_scheme,
    likely_scheme,
    refuse_devices,
)
from ..sampling.program import Program
from ..wire.shared import Segment, TensorRef, lay_out
from . import running
from .cached_sampling import CachedSampling
from .compiled_sampling import CompiledSampling
from .group import Poll, Progress, WorkerGroup
from .recipe import Inspected, Recipe, inspect, weight_bytes
from .sampling import SEGMENT, OnStep, SampleReport, Sent
from .step_request import StepRequest

log = logging.getLogger("sequence_parallel")

_MODELS = itertools.count(1)
_KEPT_CONDITIONING = 16
"""Tensors kept per model in each worker: prompt and negative prompt, a few of each."""
_BATCH_BYTES = 64 * 2**20
"""Replaced weights that travel together; a larger one travels alone."""

Replace = Callable[[str, Stored], Stored]
"""Name and tensor of the checkpoint → what the workers are to use, of the same shape and dtype, with a scale of its own
if there was one. Without a scale the tensor is in the storage dtype. It must not be written to: it may be the file."""


class RemoteModel:
    """One recipe, and where its weights are now.

    The weights may come and go (eviction, a crash, another layout): `ensure_loaded` brings them back.

    Args:
        recipe: what to load.
        inspected: the checkpoint's header, if it has been read already.
        group: run on this group instead of the shared one of the recipe's configuration.
    """

    def __init__(self, recipe: Recipe, inspected: Inspected | None = None, group: WorkerGroup | None = None):
        self.recipe = recipe
        self.inspected = inspected or inspect(recipe.path)
        self.name = f"model-{next(_MODELS)}"
        self.nbytes = 0
        """Bytes of weights that one worker has on its device; 0 when not loaded."""
        self.placement: Placement | None = None
        """Where the weights are, or were last, and why."""
        self.fp8_report: FP8Report | None = None
        """What has been quantised, of the weights that were loaded last."""
        self.last_step: list[dict[str, Any]] = []
        """What each rank said of the last step: `seconds`, `collectives` and `bytes_sent` to other ranks; with a cache
        also `cache`: `passes`, `hits` and `skipped_s` (`cache.blocks.Tally`), with compiled blocks `compile`
        (`compilation.blocks.Tally`)."""
        self._layout = resolve(recipe.config)
        self._told_degrees: Degrees | None = None
        self._reason = ""
        self._own_group = group
        self._group: WorkerGroup | None = None
        self._generation = 0
        self._fp8: FP8Settings | None = None
        self._selections: dict[FP8Settings, Selection] = {}
        self._conditioning = _SentConditioning(self.name)
        self._tensors = NativeTensors(self.inspected.source, self.inspected.adapter, self.inspected.model_config)
        self._version: Hashable = None
        self._replaced: set[str] = set()
        """Tensors that are, or may be, other than the checkpoint's in the workers."""

    @property
    def loaded(self) -> bool:
        """Whether the workers hold the weights."""
        return self._group is not None and self._group.alive and self._group.generation == self._generation

    @property
    def group(self) -> WorkerGroup | None:
        return self._group

    def ensure_loaded(
        self, poll: Poll | None = None, on_progress: Progress | None = None, *, fp8: FP8Settings | None = None
    ) -> int:
        """Starts workers and loads the weights unless both have been done.

        Args:
            poll: see `WorkerGroup.call`.
            on_progress: told in bytes.
            fp8: quantises them on the way; other settings than those in place load them anew.

        Returns:
            Bytes of weights on one worker.

        Raises:
            ConfigError: the devices cannot do what `fp8` asks for.
            WorkerError: loading failed.
        """
        group = self._own_group or running.acquire(self.recipe.config, poll)
        if self.loaded and group is self._group and fp8 == self._fp8:
            return self.nbytes
        choice = None if fp8 is None else _choose_scheme(fp8, group, poll)
        self.unload()  # what is loaded otherwise makes room for this
        placement = self._place(group, poll, fp8)
        weights: dict[str, Any] = {"mode": placement.mode, "sharing": self._layout.degrees.sharing}
        if placement.mode == "offload":
            weights["segment"] = f"{self.name}-weights"
            group.settle(poll)
            group.memory.segment(weights["segment"], 0)  # the workers know how much they need
        message = {
            "model": self.name,
            "recipe": self.recipe.to_json(),
            "weights": weights,
            "fp8": None if choice is None else choice.to_json(),
        }
        try:
            results = group.call("load", message, poll=poll, on_progress=on_progress)
        finally:
            if "segment" in weights:  # it belongs to the workers now
                group.memory.drop(weights["segment"])
        self._group, self._generation, self.placement, self._fp8 = group, group.generation, placement, fp8
        self._conditioning.clear()
        self._version = None
        self._replaced.clear()
        self.nbytes = max(result["nbytes"] for result in results)
        group.figures.holds(self.name, self.recipe.path, self.nbytes)
        log.info(
            "%s: weights %s (%s): %.0f MiB %s",
            self.recipe.path, placement.mode, placement.reason, self.nbytes / 2**20,
            "in one copy for all workers"
            if placement.mode == "offload" and self._layout.device_type == "cpu"
            else f"on each of {len(results)} workers",
        )  # fmt: skip
        self.fp8_report = None if choice is None else self._report(choice, placement, **results[0]["fp8"])
        return self.nbytes

    def _report(self, choice: FP8Choice, placement: Placement, *, saved: int, **counts: int) -> FP8Report:
        degrees, device_type = self._layout.degrees, self._layout.device_type
        return FP8Report(
            scheme=choice.scheme,
            reason=choice.reason,
            bytes_before=self.nbytes + bytes_on_device(placement.mode, saved, degrees.sharing, device_type),
            bytes_after=self.nbytes,
            **counts,
        )

    def select_fp8(self, fp8: FP8Settings) -> Selection:
        """What `fp8` will do to this model, told without workers.

        Raises:
            ConfigError: the devices cannot do it, or `skip` has a pattern that means no layer.
        """
        refuse_devices(fp8, self._layout)
        if fp8 not in self._selections:
            self._selections[fp8] = select(
                self.inspected.source,
                self.inspected.adapter,
                self._tensors,
                scheme=likely_scheme(fp8, self._layout),
                skip=fp8.patterns,
                storage=self.recipe.weight_dtype,
                compute=self.recipe.compute_dtype,
            )
        return self._selections[fp8]

    def _whole_bytes(self, fp8: FP8Settings | None) -> int:
        """Of a whole copy of the weights."""
        saved = 0 if fp8 is None else self.select_fp8(fp8).saved
        return weight_bytes(self.inspected, self.recipe) - saved

    def _place(self, group: WorkerGroup, poll: Poll | None, fp8: FP8Settings | None) -> Placement:
        """Settles where the weights go; asks the workers for their free memory only if that matters."""
        asked = self.recipe.config.weights
        if asked != "auto":
            return Placement(mode=asked, reason="as asked")
        told = group.call("free memory", {}, poll=poll)
        return choose(
            self._whole_bytes(fp8),
            [Memory(**rank["device"]) for rank in told],
            Memory(**told[0]["host"]),
            sharing=self._layout.degrees.sharing if has_fsdp2() else 1,
            device_type=self._layout.device_type,
        )

    def expected_bytes(self, fp8: FP8Settings | None = None) -> int:
        """Of weights on one worker's device when they are loaded; under `auto` as much as it may be."""
        if self.loaded and fp8 == self._fp8:
            return self.nbytes
        return bytes_on_device(
            self.recipe.config.weights,
            self._whole_bytes(fp8),
            self._layout.degrees.sharing,
            self._layout.device_type,
        )

    def replace_weights(
        self,
        version: Hashable,
        names: Collection[str],
        replace: Replace,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Makes the weights in the workers the checkpoint's but for some tensors. Only those and the last ones change.

        Every tensor is replaced starting from the checkpoint's, so nothing of earlier replacements is left in it.

        Args:
            version: what `names` and `replace` stand for; with the version that is in place nothing is done. None is
                the checkpoint itself, and has no names.
            names: tensors of the checkpoint (`NativeTensors`).
            replace: runs in the caller's thread, for one tensor at a time.
            poll: see `WorkerGroup.call`; also called before each tensor.
            on_progress: told in bytes.

        Raises:
            CheckpointError: the file changed or is damaged.
            WorkerError: a worker failed; the next call starts over.
        """
        if version == self._version:
            return
        group = self._group
        assert group is not None, "call ensure_loaded first"
        self._version = object()  # no caller's: whatever ends this early, the next call does it all
        sizes = {
            name: prod(self._tensors.shapes[name]) * self._kept_dtype(name).itemsize
            for name in {*names, *self._replaced}
        }
        total, done = sum(sizes.values()), 0
        with self.inspected.source.reader() as read:
            for batch in _batches(sizes):
                group.settle(poll)
                put = [name for name in batch if name in names]
                refs, size = lay_out("weights", [(self._tensors.shapes[n], self._kept_dtype(n)) for n in put])
                segment = group.memory.segment("weights", size)
                scales: dict[str, float] = {}
                for name, ref in zip(put, refs, strict=True):
                    if poll is not None:
                        poll()
                    stored = self._tensors.read(name, read)
                    value, scale = replace(name, Stored(stored.tensor.to(self._kept_dtype(name)), stored.scale))
                    assert value.shape == ref.shape and value.dtype == self._kept_dtype(name)
                    assert (scale is None) == (stored.scale is None)
                    segment.tensor(ref).copy_(value)
                    if scale is not None:
                        scales[name] = scale
                restore = [name for name in batch if name not in names]
                message = {
                    "model": self.name,
                    "put": {name: ref.to_json() for name, ref in zip(put, refs, strict=True)},
                    "scales": scales,
                    "restore": restore,
                }
                self._replaced |= set(put)
                group.call("weights", message, poll=poll)
                self._replaced -= set(restore)
                done += sum(sizes[name] for name in batch)
                if on_progress is not None:
                    on_progress(done, total)
        self._version = version

    def _kept_dtype(self, name: str) -> torch.dtype:
        """In which the workers keep a tensor of the checkpoint, but for what a family keeps in full precision."""
        source = self.inspected.source
        if name in source.scales:
            return source.tensors[name].dtype
        # What a scaled-fp8 file keeps out of fp8 stays out of it, whatever the storage dtype.
        return self.recipe.compute_dtype if source.scales else self.recipe.weight_dtype

    def unload(self) -> None:
        """Frees the weights in the workers; the processes stay."""
        group, was_loaded = self._group, self.loaded
        self._group, self._generation, self.nbytes = None, 0, 0
        self._conditioning.clear()
        if group is not None and was_loaded:
            group.figures.dropped(self.name)
            try:
                # A sampling that was cancelled has left its noise.
                group.call("unload", {"model": self.name, "drop": [SEGMENT]})
                group.memory.drop(SEGMENT)
            except WorkerError as error:  # the weights have gone with the workers
                log.warning("%s", error)

    def release(self) -> None:
        """As `unload`, without waiting: for a finalizer, which may run in the middle of anything."""
        if self._group is not None and self.loaded:
            self._group.figures.dropped(self.name)
            self._group.post("unload", {"model": self.name, "drop": []})
        self._group, self._generation = None, 0

    def forget(self, cache: CachedSampling) -> None:
        """Frees what the workers remember of a sampling, without waiting."""
        if self._group is not None and self.loaded:
            self._group.post("forget_cache", {"model": self.name, "sampling": cache.number})

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
            self._conditioning.clear()  # what the workers hold now is unknown: send it again
            if cache is not None:
                self.forget(cache)
                cache.restart()
            raise
        if cache is not None:
            cache.count(self.last_step, degrees)
        if compiled is not None:
            compiled.count(self.last_step)
        self._note_step(group, requests, degrees, cache, compiled, self.last_step)
        return [
            _hand_over(results, ref, request.x.device, lend) for ref, request in zip(out_refs, requests, strict=True)
        ]

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
    ) -> tuple[Tensor, SampleReport]:
        """A whole sampling, for which each worker gets one message.

        Args:
            program: see `sampling.recording`.
            cache, compiled: as for `steps`.
            poll: see `WorkerGroup.call`.
            on_step: see `OnStep`.

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
        sent = Sent(program, degrees, group.memory, with_previews=on_step is not None)
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
            results = group.call(
                "sample", message, poll=poll, on_progress=None if on_step is None else sent.previewed(on_step)
            )
        except BaseException:
            self._conditioning.clear()
            if cache is not None:
                self.forget(cache)
                cache.restart()
            raise
        report = SampleReport(program.steps, len(passes), group.messages - before, seconds=time.monotonic() - began)
        if cache is not None:
            for i, each in enumerate(sent.degrees):
                cache.count([result["degrees"][i] for result in results], each)
        if compiled is not None and networks:
            compiled.count(results)
        self.last_step = results
        if networks:
            requests = [each.request for each in networks[0].passes]
            n = len(networks)
            counted = ("collectives", "bytes_sent")
            per_call = [
                {"seconds": each["seconds"] / n, **{name: each[name] // n for name in counted}} for each in results
            ]
            self._note_step(group, requests, degrees[0], cache, compiled, per_call)
        result = sent.result()
        sent.clear()
        return result, report


def _choose_scheme(fp8: FP8Settings, group: WorkerGroup, poll: Poll | None) -> FP8Choice:
    """The scheme for all ranks, by what each says of its device."""
    found = [result["support"] for result in group.call("fp8 support", {}, poll=poll)]
    return choose_scheme(fp8, group.layout, found)


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in groups of at most `_BATCH_BYTES`, or of one."""
    batch: list[str] = []
    room = _BATCH_BYTES
    for name in sorted(sizes):  # near the order of the file
        if batch and sizes[name] > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(name)
        room -= sizes[name]
    if batch:
        yield batch


class _SentConditioning:
    """Which tensors the workers hold, by content: ComfyUI makes new tensors of the same values at every step."""

    def __init__(self, model: str):
        self._model = model
        self._sent: OrderedDict[str, Tensor] = OrderedDict()
        self._numbers = itertools.count(1)
        self._stale: list[str] = []

    def clear(self) -> None:
        self._stale += self._sent
        self._sent.clear()

    def update(
        self, wanted: Sequence[Mapping[str, Tensor]], group: WorkerGroup
    ) -> tuple[list[dict[str, str]], dict[str, Any], list[str]]:
        """Finds what is new and writes it to shared memory.

        Returns:
            For each request, name → key; key → place of the tensors to take over; keys to forget.
        """
        keys: list[dict[str, str]] = []
        new: dict[str, Tensor] = {}
        for conditioning in wanted:
            keys.append({})
            for name, tensor in conditioning.items():
                key = next((key for key, sent in self._sent.items() if _same(sent, tensor)), None)
                if key is None:
                    key = f"{self._model}/{next(self._numbers)}"
                    new[key] = self._sent[key] = tensor.detach().clone()
                self._sent.move_to_end(key)
                keys[-1][name] = key
        drop, self._stale = self._stale, []
        while len(self._sent) > max(_KEPT_CONDITIONING, sum(map(len, keys))):
            drop.append(self._sent.popitem(last=False)[0])
        put: dict[str, Any] = {}
        if new:
            refs, size = lay_out("conditioning", [(tensor.shape, tensor.dtype) for tensor in new.values()])
            segment = group.memory.segment("conditioning", size)
            for (key, tensor), ref in zip(new.items(), refs, strict=True):
                segment.tensor(ref).copy_(tensor)
                put[key] = ref.to_json()
        return keys, put, drop


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _hand_over(segment: Segment, ref: TensorRef, device: torch.device, lend: bool) -> Tensor:
    """A result that the next step cannot overwrite."""
    if device.type != "cpu":
        return segment.tensor(ref).to(device)
    return segment.lend(ref) if lend else segment.tensor(ref).clone()
