"""Runs a recorded sampling (`sampling.program`) on this rank.

Between two passes through the network each rank holds and computes an equal share of every latent's elements. The share
is independent of the tokens that the rank owns in the network, since those depend on the prompt length and differ
between batch groups. Ranks exchange the latents and predictions of a pass through shared memory: each rank writes and
reads its shares, the network reads the latents that its tokens need, and nothing is gathered.
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
"""Runs this rank's part of the passes; returns False if its part of the predictions is not finite."""


class PredictionNotFinite(Exception):
    """A prediction with NaN or infinite values; raised on all ranks together.

    Args:
        instruction: the instruction whose passes gave the prediction.
        steps: number of steps of this program that had been reported by then.
    """

    def __init__(self, instruction: RunNetwork, steps: int):
        super().__init__(instruction, steps)
        self.instruction, self.steps = instruction, steps


class Sampling:
    """One sampling on this rank, which holds its share of each latent.

    Args:
        message: the host's request.
        link: connection to the host.
        ranks: the process groups of this rank.
        traffic: records the wall time of waits for other ranks; no device computes meanwhile.
    """

    def __init__(self, message: Sample, link: HostLink, ranks: Ranks, traffic: Traffic):
        self._message, self._ranks, self._traffic = message, ranks, traffic
        self._tensor_at, self._control = link.tensor, link.control
        result = self._tensor_at(message.out)
        self._sample = result[0].numel()
        """Number of elements in one sample of a latent."""
        self._share = ranges(shares(result.numel(), [1.0] * ranks.world_size))[ranks.rank]
        self._latents = {int(n): self._mine(self._tensor_at(ref)) for n, ref in message.constants.items()}
        self._times_kept = 0
        self._show = False
        self._shown = 0
        self._shown_at = -math.inf
        self._last_report = max((i for i, each in enumerate(message.program) if isinstance(each, Report)), default=-1)

    def run(self, passes: RunPasses, on_report: Callable[[int, int], None]) -> None:
        """Runs every instruction, then writes this rank's share of the result.

        Args:
            passes: runs the network.
            on_report: called with the number of steps done and the total number of steps.

        Raises:
            StepCancelled: on all ranks, after the same pass.
            PredictionNotFinite: on all ranks, after the same pass.
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
        """Runs the passes; returns False if a prediction is not finite, with the same result on all ranks."""
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
        """Returns, for each flag, whether it is set on any rank. Collective over all ranks of the world."""
        if self._ranks.world_size == 1:
            return list(seen)
        flags = torch.tensor([float(each) for each in seen], device=self._ranks.device)
        with self._traffic.waiting():
            dist.all_reduce(flags)
            counts = flags.tolist()
        return [count > 0 for count in counts]

    def _preview_is_due(self) -> bool:
        """Returns whether the host has read the last preview and the preview interval has passed since it was shown."""
        preview = self._message.previews
        if preview is None or int(self._tensor_at(preview.wanted)) <= self._shown:
            return False
        return time.monotonic() >= self._shown_at + preview.interval_s

    def _report(self, instruction: Report, is_last: bool) -> None:
        """Writes this rank's share of the preview to shared memory if one is due, and always for the last report."""
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
        """Saves this rank's share of the state after a step in shared memory, for the host to resume from.

        Two slots take turns. A rank overwrites the older state only after a further pass, which every rank has begun;
        by then all ranks have written the newer state.
        """
        kept = self._message.kept
        if kept is None or (numbers := kept.places.get(str(place))) is None:
            return
        for ref, number in zip(kept.latents[self._times_kept % 2], numbers, strict=False):
            self._mine(self._tensor_at(ref)).copy_(self._latents[number])
        self._tensor_at(kept.done)[self._ranks.rank] = place
        self._times_kept += 1

    def _value(self, terms: list[Any]) -> Tensor:
        """Computes this rank's share of a sum of products."""
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
        """Returns a view of this rank's share of a latent."""
        return whole.view(-1)[slice(*self._share)]

    def _write(self, x: Tensor, place: int, mine: Tensor) -> None:
        """Copies a share of a latent into x [samples, channels, …], which may have more channels after the latent's."""
        samples = self._message.size // self._sample
        first, last = self._share
        for sample in range(samples):
            start, stop = max(first, sample * self._sample), min(last, (sample + 1) * self._sample)
            if start < stop:
                row = x[place * samples + sample].view(-1)[: self._sample]
                offset = sample * self._sample
                row[start - offset : stop - offset].copy_(mine[start - first : stop - first])
