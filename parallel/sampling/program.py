"""A sampling as a list of instructions, which all ranks run alike.

Between two passes through the network a sampler that can be recorded does nothing but multiply latents, elementwise, by
numbers and by other latents, and add them up. So one kind of instruction is enough for all of them, and each rank can
do it for the elements that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..wire.messages import Evaluate, Report, Terms
from .step_request import StepRequest


@dataclass(frozen=True, slots=True)
class Pass:
    """One call of the network within an instruction."""

    request: StepRequest
    """Its x has a shape and a dtype, but no data."""
    latents: tuple[int, ...]
    """What its x consists of: these latents, one after the other along the batch."""
    concat: Tensor | None
    """Channels that follow the latents' in x, [samples of x, channels, …]; the same tensor wherever they are equal."""
    results: tuple[int, ...]
    """The predictions, cut as the latents."""
    output_shape: tuple[int, ...]
    conditions: frozenset[int]
    """Which of cond and uncond it computes, as ComfyUI numbers them."""


@dataclass(frozen=True, slots=True)
class Network:
    """Passes that do not need each other's results."""

    passes: list[Pass]
    sigma: float
    """The step's; decides whether a cache is active."""

    @property
    def conditions(self) -> int:
        """How many of cond and uncond run here."""
        return max(1, len(frozenset().union(*(each.conditions for each in self.passes))))

    @property
    def results(self) -> set[int]:
        """Of all passes."""
        return {latent for each in self.passes for latent in each.results}


Instruction = Evaluate | Network | Report


@dataclass(slots=True)
class Program:
    """A recorded sampling."""

    shape: tuple[int, ...]
    """Of every latent."""
    device: torch.device
    """Where the result is wanted."""
    constants: dict[int, Tensor] = field(default_factory=dict)
    """Latents that are given: noise, the image, masks; fp32, on the CPU."""
    instructions: list[Instruction] = field(default_factory=list)
    result: Terms = field(default_factory=list)

    @property
    def networks(self) -> list[Network]:
        return [instruction for instruction in self.instructions if isinstance(instruction, Network)]

    @property
    def steps(self) -> int:
        """As many as report themselves."""
        return max(
            (instruction.steps for instruction in self.instructions if isinstance(instruction, Report)), default=0
        )

    def kept(self) -> dict[int, list[int]]:
        """Place of each report behind which the sampling can go on → the latents, but constants, that it needs then.

        Between two such places there is a pass through the network, after which all ranks have left the first one.
        """
        alive: set[int] = set()
        kept: dict[int, list[int]] = {}
        passed = False
        for place, (instruction, freed) in enumerate(zip(self.instructions, self.last_uses(), strict=True)):
            if isinstance(instruction, Network):
                alive, passed = alive | instruction.results, True
            elif isinstance(instruction, Evaluate):
                alive.add(instruction.evaluate)
            alive -= set(freed)
            if isinstance(instruction, Report) and passed:
                kept[place], passed = sorted(alive), False
        return kept

    def rest(self, place: int, latents: Mapping[int, Tensor]) -> Program:
        """What is left to do behind an instruction.

        Args:
            latents: those that `kept` names for this place.
        """
        left = self.instructions[place + 1 :]
        needed = set().union(*map(_used, left), *(used for _, used in self.result))
        constants = {number: tensor for number, tensor in (self.constants | dict(latents)).items() if number in needed}
        return Program(self.shape, self.device, constants, left, self.result)

    def last_uses(self) -> list[list[int]]:
        """For each instruction, the latents (but constants) that no later one needs."""
        needed = {latent for _, latents in self.result for latent in latents}
        freed: list[list[int]] = []
        for instruction in reversed(self.instructions):
            here = _used(instruction)
            freed.append(sorted(here - needed - self.constants.keys()))
            needed |= here
        return freed[::-1]


def _used(instruction: Instruction) -> set[int]:
    """Latents that it reads or makes."""
    if isinstance(instruction, Network):
        return instruction.results.union(*(each.latents for each in instruction.passes))
    if isinstance(instruction, Evaluate):
        return {instruction.evaluate}.union(*(latents for _, latents in instruction.terms))
    return {latent for _, latents in [*instruction.denoised, *instruction.x] for latent in latents}
