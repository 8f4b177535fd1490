"""A sampling as a list of instructions that all ranks run alike.

Between two passes through the network, a sampler that can be recorded only multiplies latents, elementwise, by numbers
and by other latents, and sums them. One kind of instruction therefore suffices for all samplers, and each rank can run
it for the elements that it holds.
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
    """Request of the call; its x has a shape and a dtype, but no data."""
    latents: tuple[int, ...]
    """Numbers of the latents that form its x, concatenated along the batch."""
    concat: Tensor | None
    """Channels that follow the latents' in x, [samples of x, channels, …]; passes with equal ones share one tensor."""
    results: tuple[int, ...]
    """Numbers of the predictions, split like the latents."""
    output_shape: tuple[int, ...]
    conditions: frozenset[int]
    """Conditions that it computes (cond, uncond), as ComfyUI numbers them."""


@dataclass(frozen=True, slots=True)
class Network:
    """Instruction that runs passes, none of which needs another's result."""

    passes: list[Pass]
    sigma: float
    """Sigma of the step; decides whether a cache is active."""

    @property
    def conditions(self) -> int:
        """Number of conditions (cond, uncond) that run here, at least 1."""
        return max(1, len(frozenset().union(*(each.conditions for each in self.passes))))

    @property
    def results(self) -> set[int]:
        """Numbers of the predictions of all passes."""
        return {latent for each in self.passes for latent in each.results}


Instruction = Evaluate | Network | Report


@dataclass(slots=True)
class Program:
    """A recorded sampling."""

    shape: tuple[int, ...]
    """Shape of every latent."""
    device: torch.device
    """Device of the result."""
    constants: dict[int, Tensor] = field(default_factory=dict)
    """Latents whose data is known, by number: noise, the image, masks; fp32, on the CPU."""
    instructions: list[Instruction] = field(default_factory=list)
    result: Terms = field(default_factory=list)

    @property
    def networks(self) -> list[Network]:
        return [instruction for instruction in self.instructions if isinstance(instruction, Network)]

    @property
    def steps(self) -> int:
        """Number of steps that the reports state; 0 without reports."""
        return max(
            (instruction.steps for instruction in self.instructions if isinstance(instruction, Report)), default=0
        )

    def kept(self) -> dict[int, list[int]]:
        """Maps each report after which the sampling can resume, by index, to the latents, except constants, to keep.

        Between two such reports there is a pass through the network, after which all ranks have passed the first one.
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
        """Returns the program that remains after an instruction.

        Args:
            place: index of the instruction.
            latents: the latents that `kept` lists for it.
        """
        left = self.instructions[place + 1 :]
        needed = set().union(*map(_used, left), *(used for _, used in self.result))
        constants = {number: tensor for number, tensor in (self.constants | dict(latents)).items() if number in needed}
        return Program(self.shape, self.device, constants, left, self.result)

    def last_uses(self) -> list[list[int]]:
        """Returns, for each instruction, the latents (except constants) that it uses and that nothing later needs."""
        needed = {latent for _, latents in self.result for latent in latents}
        freed: list[list[int]] = []
        for instruction in reversed(self.instructions):
            here = _used(instruction)
            freed.append(sorted(here - needed - self.constants.keys()))
            needed |= here
        return freed[::-1]


def _used(instruction: Instruction) -> set[int]:
    """Returns the latents that the instruction reads or computes."""
    if isinstance(instruction, Network):
        return instruction.results.union(*(each.latents for each in instruction.passes))
    if isinstance(instruction, Evaluate):
        return {instruction.evaluate}.union(*(latents for _, latents in instruction.terms))
    return {latent for _, latents in [*instruction.denoised, *instruction.x] for latent in latents}
