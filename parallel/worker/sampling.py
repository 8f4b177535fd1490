"""Runs a recorded sampling (`sampling.program`) on this rank.

Between two passes through the network each rank holds, and calculates, an equal share of every latent's elements,
whichever tokens it owns in the network: those change with the length of the prompt, and differ between batch groups.
The latents of a pass go through shared memory, where every rank finds what its tokens need, and so do the predictions.
Both are written and read by shares, and nothing is gathered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.traffic import Traffic
from ..errors import StepCancelled
from ..plan import ranges, shares
from ..wire.messages import Evaluate, Report, RunNetwork, Sample
from .host_link import HostLink
from .ranks import Ranks

RunPasses = Callable[[RunNetwork], bool]
"""Runs this rank's part of the passes; False where its part of the predictions is not finite."""


class PredictionNotFinite(Exception):
    """Raised on all ranks alike.

    Args:
        instruction: whose passes it was.
        steps: of this program that had been reported by then.
    """

    def __init__(self, instruction: RunNetwork, steps: int):
        super().__init__(instruction, steps)
        self.instruction, self.steps = instruction, steps


class Sampling:
    """The latents of one sampling: this rank's share of each.

    Args:
        message: what the host sent.
        link: to the host.
        ranks: this rank among the others.
        traffic: times the waits for them, by the clock: no device computes meanwhile.
    """

    def __init__(self, message: Sample, link: HostLink, ranks: Ranks, traffic: Traffic):
        self._message, self._ranks, self._traffic = message, ranks, traffic
        self._tensor_at, self._control = link.tensor, link.control
        result = self._tensor_at(message.out)
        self._sample = result[0].numel()
        """Elements of one sample of a latent."""
        self._share = ranges(shares(result.numel(), [1.0] * ranks.world_size))[ranks.rank]
        self._latents = {int(n): self._mine(self._tensor_at(ref)) for n, ref in message.constants.items()}
        self._times_kept = 0
        self._show = False
        self._shown = 0
        self._shown_at = -math.inf
        self._last_report = max((i for i, each in enumerate(message.program) if isinstance(each, Report)), default=-1)

    def run(self, passes: RunPasses, on_report: Callable[[int, int], None]) -> None:
        """Every instruction, then this rank's share of the result.

        Args:
            passes: runs the network.
            on_report: called with the number of steps done and of all.

        Raises:
            StepCancelled: on all ranks, after the same pass.
            PredictionNotFinite: likewise.
        """
        steps = zip(self._message.program, self._message.free, strict=True)
        for place, (instruction, done_with) in enumerate(steps):
            if isinstance(instruction, RunNetwork):
                if not self._network(instruction, passes):
                    reported = sum(isinstance(each, Report) for each in self._message.program[:place])
                    raise PredictionNotFinite(instruction, reported)
            elif isinstance(instruction, Evaluate):
                self._latents[instruction.evaluate] = self._value(instruction.terms)
            else:
                self._report(instruction, is_last=place == self._last_report)
                on_report(instruction.step + 1, instruction.steps)
            for number in done_with:
                del self._latents[number]
            self._keep(place)
        self._mine(self._tensor_at(self._message.out)).copy_(self._value(self._message.result))

    # --- instructions -------------------------------------------------------------------------------------------

    def _network(self, instruction: RunNetwork, passes: RunPasses) -> bool:
        """False where a prediction is not finite; the same answer on all ranks."""
        for each in instruction.passes:
            x = self._tensor_at(each.request.x)
            for place, number in enumerate(each.latents):
                self._write(x, place, self._latents[number])
        self._any(False)  # x is complete
        stopped, finite = False, True
        try:
            finite = passes(instruction)
        except StepCancelled:  # this rank's batch group has stopped; another one may just have finished
            stopped = True
        stopped, self._show, not_finite = self._any(
            stopped or self._control.cancel_requested, self._ranks.rank == 0 and self._preview_is_due(), not finite
        )
        if stopped:
            raise StepCancelled("stopped between two passes")
        if not_finite:
            return False
        size = self._message.size
        for each in instruction.passes:
            out = self._tensor_at(each.request.out).view(-1)
            for place, number in enumerate(each.results):
                self._latents[number] = self._mine(out[place * size : (place + 1) * size]).float().clone()
        return True

    def _any(self, *seen: bool) -> list[bool]:
        """For each, whether some rank has seen it. All ranks of the world ask, and wait for each other."""
        if self._ranks.world_size == 1:
            return list(seen)
        flags = torch.tensor([float(each) for each in seen], device=self._ranks.device)
        with self._traffic.waiting():
            dist.all_reduce(flags)
            counts = flags.tolist()
        return [count > 0 for count in counts]

    def _preview_is_due(self) -> bool:
        """Whether the host has looked at the latents before, and its interval has passed since they were shown."""
        preview = self._message.previews
        if preview is None or int(self._tensor_at(preview.wanted)) <= self._shown:
            return False
        return time.monotonic() >= self._shown_at + preview.interval_s

    def _report(self, instruction: Report, is_last: bool) -> None:
        """Shows the latent if a preview is due, and the last one in any case; else it stays here."""
        preview = self._message.previews
        if preview is None or not (self._show or is_last):
            return
        self._show = False
        self._shown += 1
        self._shown_at = time.monotonic()
        latents = (instruction.denoised, instruction.x)
        for place, terms in zip(preview.latents[self._shown % 2], latents, strict=True):
            self._mine(self._tensor_at(place)).copy_(self._value(terms))
        self._tensor_at(preview.shown)[self._ranks.rank] = torch.tensor([self._shown, instruction.step])

    def _keep(self, place: int) -> None:
        """Leaves this rank's share of the state behind a step where the host finds it.

        A rank overwrites the state of the step before the last one only after another pass, which every rank has begun:
        all have left that of the last step by then.
        """
        kept = self._message.kept
        if kept is None or (numbers := kept.places.get(str(place))) is None:
            return
        for ref, number in zip(kept.latents[self._times_kept % 2], numbers, strict=False):
            self._mine(self._tensor_at(ref)).copy_(self._latents[number])
        self._tensor_at(kept.done)[self._ranks.rank] = place
        self._times_kept += 1

    def _value(self, terms: list[Any]) -> Tensor:
        """This rank's share of a sum of products."""
        total = torch.zeros(self._share[1] - self._share[0])
        for factor, numbers in terms:
            if not numbers:
                total += factor
                continue
            product = self._latents[numbers[0]]
            for number in numbers[1:]:
                product = product * self._latents[number]
            total.add_(product, alpha=factor)
        return total

    # --- shares -------------------------------------------------------------------------------------------------

    def _mine(self, whole: Tensor) -> Tensor:
        """A view of this rank's share of a latent."""
        return whole.view(-1)[slice(*self._share)]

    def _write(self, x: Tensor, place: int, mine: Tensor) -> None:
        """Puts a share of a latent into x [samples, channels, …], where further channels may follow the latent's."""
        samples = self._message.size // self._sample
        first, last = self._share
        for sample in range(samples):
            start, stop = max(first, sample * self._sample), min(last, (sample + 1) * self._sample)
            if start < stop:
                row = x[place * samples + sample].view(-1)[: self._sample]
                offset = sample * self._sample
                row[start - offset : stop - offset].copy_(mine[start - first : stop - first])
