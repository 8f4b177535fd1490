"""Single steps and whole samplings on a worker."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..attention.traffic import Traffic
from ..cache.blocks import StepPasses, Tally
from ..degrees import Degrees
from ..mesh import Mesh
from ..plan import share_of
from ..wire.messages import CacheRule, NotFinite, Request, RunNetwork, Sample, Step
from .finite import FirstNotFinite
from .host_link import HostLink
from .models import Models
from .ranks import ParallelContext, Ranks
from .sampling import PredictionNotFinite, Sampling
from .split_network import SplitNetwork
from .tiles import Operations

if TYPE_CHECKING:
    from ..compilation.modules import CompiledModules

_BLOCKS_OF_A_PASS = 2**20
"""Upper bound of the number of blocks that one step of a sampling runs."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Result of running this rank's part of requests."""

    tally: Tally
    """Counters of the cache."""
    finite: bool
    """True if this rank's part of the predictions is finite."""


class Steps:
    def __init__(self, link: HostLink, ranks: Ranks, models: Models):
        self._link, self._ranks, self._models = link, ranks, models
        self.operations: Operations = {Step: self._step, Sample: self._sample}

    def _step(self, message: Step) -> dict[str, Any]:
        model = self._models.conditioned(message.model, message.conditioning)
        mesh = self._mesh(message.degrees, cached=message.cache is not None)
        with model.evaluating():
            compiler = model.compiled(message.compile, self._link.beat)
            began = time.perf_counter()
            context = ParallelContext(self._ranks, mesh, self._link.control)
            if message.watch:
                return {"where": asdict(self._watched(model, message.requests, mesh, context))}
            ran = self._run(model, message.requests, mesh, context, message.cache, compiler)
        counted: dict[str, Any] = {"finite": ran.finite}
        if message.cache is not None:
            counted["cache"] = asdict(ran.tally)
        if compiler is not None:
            counted["compile"] = asdict(compiler.take_tally())
        return {"seconds": time.perf_counter() - began, **context.traffic.to_json(), **counted}

    def _sample(self, message: Sample) -> dict[str, Any]:
        """Runs a whole sampling; reports its passes' seconds and cache counters for each item of `message.degrees`."""
        model = self._models.conditioned(message.model, message.conditioning)
        meshes = [self._mesh(degrees, cached=message.cache is not None) for degrees in message.degrees]
        contexts: list[ParallelContext] = []
        traffic = Traffic()
        seconds, tallies = [0.0 for _ in meshes], [Tally() for _ in meshes]
        compiler = model.compiled(message.compile, self._link.beat)

        def new_context(which: int) -> ParallelContext:
            # Batch groups may have run unequal numbers of blocks; under the next degrees their ranks may be one group.
            first_block = len(contexts) * _BLOCKS_OF_A_PASS
            contexts.append(ParallelContext(self._ranks, meshes[which], self._link.control, first_block))
            return contexts[-1]

        def passes(instruction: RunNetwork) -> bool:
            which = instruction.degrees
            context = new_context(which)
            rule = None if message.cache is None else replace(message.cache, active=instruction.active)
            began = time.perf_counter()
            requests = [each.request for each in instruction.passes]
            ran = self._run(model, requests, meshes[which], context, rule, compiler)
            tallies[which].add(ran.tally)
            seconds[which] += time.perf_counter() - began
            return ran.finite

        not_finite: dict[str, Any] = {}
        with model.evaluating():
            began = time.perf_counter()
            try:
                Sampling(message, self._link, self._ranks, traffic).run(passes, self._link.tell_progress)
            except PredictionNotFinite as found:
                requests, which = [each.request for each in found.instruction.passes], found.instruction.degrees
                where = self._watched(model, requests, meshes[which], new_context(which))
                not_finite = {"not_finite": {"steps": found.steps, "where": asdict(where)}}
        for context in contexts:
            traffic.include(context.traffic)
        counted = {} if compiler is None else {"compile": asdict(compiler.take_tally())}
        return {
            **counted,
            **not_finite,
            "seconds": time.perf_counter() - began,
            **traffic.to_json(),
            "degrees": [
                {"seconds": took, "cache": asdict(tally)} for took, tally in zip(seconds, tallies, strict=True)
            ],
        }

    def _mesh(self, degrees: Degrees, *, cached: bool) -> Mesh:
        """Returns the mesh after creating all process groups that it needs. Creating them is collective over the world,
        and must not happen later, when one batch group may stop before another."""
        mesh = self._ranks.mesh(degrees)
        if cached:
            self._ranks.total(mesh, Traffic())
        return mesh

    def _run(
        self,
        model: SplitNetwork,
        requests: list[Request],
        mesh: Mesh,
        context: ParallelContext,
        rule: CacheRule | None = None,
        compiler: CompiledModules | None = None,
        watch: FirstNotFinite | None = None,
    ) -> Ran:
        """Runs this rank's part of requests that run side by side; on return the results are in shared memory.

        Args:
            rule: cache rule of the sampling.
            compiler: compiler of the model's blocks; each is compared with the uncompiled block when it runs.
            watch: checks the network's inputs.
        """
        kernel = self._ranks.chosen
        attentions = [
            model.check_request(request, mesh.degrees.ring, None if kernel is None else kernel.name)
            for request in requests
        ]
        cache = None
        if rule is not None:
            cache, total = model.cache(rule.sampling, rule.rule), self._ranks.total(mesh, context.traffic)
            cache.begin_step(mesh.degrees, rule.active)
        batches = [request.x.shape[0] for request in requests]
        parts = share_of(batches, mesh.group, mesh.degrees.groups)
        finite: list[torch.Tensor] = []
        for request, attention, rows in zip(requests, attentions, parts, strict=True):
            if rows.stop == rows.start:
                continue
            shape, passes = request.x.shape, None
            if cache is not None:
                passes = StepPasses(cache, (request.label, rows.start, rows.stop), shape, total)
            work = (id(model), rows.stop - rows.start, shape)
            sequence = self._ranks.sequence(mesh, context, attention, work)
            finite.append(model.step(request, rows, self._link.tensor, sequence, passes, compiler, watch))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        context.finish()
        return Ran(Tally() if cache is None else cache.tally, all(map(bool, finite)))

    def _watched(self, model: SplitNetwork, requests: list[Request], mesh: Mesh, context: ParallelContext) -> NotFinite:
        """Runs the requests again, without skipping blocks, and finds where values on this rank stop being finite."""
        watch = model.watch()
        with watch.watching():
            ran = self._run(model, requests, mesh, context, watch=watch)
        return watch.found(ran.finite)
