"""Benchmark operations of a worker: calls without a model, and an artificial slowdown."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from ..attention.traffic import Traffic
from ..plan import AttentionPlan
from ..wire.messages import Attention, Echo, Slow
from .host_link import HostLink
from .measurement import Slowed, measure_attention
from .ranks import Ranks
from .tiles import Operations


class Benchmarks:
    def __init__(self, link: HostLink, ranks: Ranks):
        self._link, self._ranks = link, ranks
        self._times = 1
        self.operations: Operations = {Echo: self._echo, Attention: self._attention, Slow: self._slow}

    def pace(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which this rank is slowed down by the factor of the last `Slow` message."""
        return Slowed(self._times) if self._times > 1 else contextlib.nullcontext()

    def _echo(self, message: Echo) -> dict[str, Any]:
        """Writes this rank's share of the input to the output: a remote call without a model."""
        began = time.perf_counter()
        x, out = self._link.tensor(message.x).flatten(), self._link.tensor(message.out).flatten()
        share = -(-x.numel() // self._ranks.world_size)
        mine = slice(self._ranks.rank * share, (self._ranks.rank + 1) * share)
        out[mine].copy_(x[mine])
        return {"seconds": time.perf_counter() - began}

    def _attention(self, message: Attention) -> dict[str, Any]:
        """Measures one attention on random data."""
        mesh = self._ranks.mesh(message.degrees)
        weights = mesh.members(self._ranks.weights)
        plan = AttentionPlan.of_sequence(message.tokens, message.heads, weights, mesh.degrees.ring)
        device = self._ranks.device
        traffic = Traffic(on_cuda=device.type == "cuda")
        return measure_attention(
            self._ranks.joint_attention(plan, mesh, message.pipeline, traffic),
            traffic,
            plan,
            mesh.sp_rank,
            self._ranks.kernel,
            batch=message.batch,
            head_dim=message.head_dim,
            dtype=getattr(torch, message.dtype),
            device=device,
            check=message.check,
        )

    def _slow(self, message: Slow) -> dict[str, Any]:
        """Sets the factor by which this rank is slowed down from now on."""
        self._times = message.times[self._ranks.rank]
        return {}
