"""Sends a recorded sampling to the workers: lays out its tensors in shared memory and builds the message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from ..sampling.program import Network, Pass, Program
from ..wire import messages
from ..wire.shared import TensorRef, lay_out
from .calls import Progress
from .memory import GroupMemory

SEGMENT = "sampling"
OUTPUT_DTYPE = torch.float32
"""Dtype of predictions. It holds the values of every dtype that networks compute in, and samplers use it."""

OnStep = Callable[[int, Tensor, Tensor, int], None]
"""Callback with the arguments of ComfyUI's callbacks: step number (from 0), denoised latent, latent, number of steps.
Steps are skipped if the callback is slower than the steps, or if no preview is due; the last step never is."""


@dataclass(slots=True)
class SampleReport:
    """Report on a sampling that the workers have run."""

    steps: int
    passes: int
    """Number of network calls."""
    messages: int
    """Number of messages from the host to each worker for the whole sampling."""
    seconds: float
    previews: int
    """Number of times that latents were sent back before the end; 0 if no previews are required."""
    resumed: int = 0
    """Number of times that fresh workers took over. `messages` and `previews` count only the last workers'."""


class Sent:
    """A sampling program laid out in shared memory.

    Args:
        program: the recorded sampling to run.
        degrees: degrees of each of its `Network` instructions.
        memory: shared memory of the group.
        ranks: number of ranks of the group.
        with_previews: True if latents are required while the sampling runs.
        interval_s: minimum seconds between two previews; 0: every step.
        keep: True if the state after each step must outlive the workers.
    """

    def __init__(
        self,
        program: Program,
        degrees: Sequence[Degrees],
        memory: GroupMemory,
        *,
        ranks: int,
        with_previews: bool,
        interval_s: float,
        keep: bool,
    ):
        self._program = program
        self.of_network = list(degrees)
        """Degrees of each `Network` instruction, in order."""
        self.degrees = list(dict.fromkeys(degrees))
        self._tensors: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._copies: list[tuple[int, Tensor]] = []
        self._places: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._timesteps: dict[int, int] = {}
        constants = {number: self._copied(tensor) for number, tensor in program.constants.items()}
        networks = [[self._pass_places(slot, each) for slot, each in enumerate(n.passes)] for n in program.networks]
        latent = (program.shape, torch.float32)
        result = self._room(*latent)
        shown = [[self._room(*latent) for _ in range(2)] for _ in range(2)] if with_previews else []
        wanted, counts = self._room((1,), torch.int64), self._room((ranks, 2), torch.int64)
        self._places_kept = program.kept() if keep else {}
        most = max(map(len, self._places_kept.values()), default=0)
        kept = [[self._room(*latent) for _ in range(most)] for _ in range(2)]
        done = self._room((ranks,), torch.int64)
        refs, size = lay_out(SEGMENT, self._tensors)
        segment = self._segment = memory.segment(SEGMENT, size)
        for place, tensor in self._copies:
            segment.tensor(refs[place]).copy_(tensor)
        self._concatenate(refs)
        self._result = refs[result]
        self._shown = [[refs[place] for place in pair] for pair in shown]
        self._counts = segment.tensor(refs[counts]).zero_()
        """[world, 2]: number of previews that each rank has written, and the step of the last one."""
        self._wanted = segment.tensor(refs[wanted]).fill_(1)
        """[1]: number of previews that the ranks may write so far."""
        self._previews = None
        if shown:
            self._previews = messages.Previews(
                wanted=refs[wanted], shown=refs[counts], latents=self._shown, interval_s=interval_s
            )
        self._done = segment.tensor(refs[done]).fill_(-1)
        self._kept = None
        if self._places_kept:
            self._kept = messages.KeptState(
                places={str(place): numbers for place, numbers in self._places_kept.items()},
                latents=[[refs[place] for place in row] for row in kept],
                done=refs[done],
            )
        self._constants = {str(number): refs[place] for number, place in constants.items()}
        self._networks = [[{name: refs[at] for name, at in places.items()} for places in each] for each in networks]

    def message(
        self,
        model: str,
        keys: Sequence[dict[str, str]],
        conditioning: messages.Conditioning,
        *,
        is_active: Callable[[float], bool],
        cache: messages.CacheRule | None,
        compiled: CompileSettings | None,
    ) -> messages.Sample:
        """Returns the message to the workers.

        Args:
            model: name of the model that runs.
            keys: for each pass, in order: maps names of inputs to keys of their conditioning.
            conditioning: conditioning tensors that the workers must keep or drop.
            is_active: returns True for a sigma if a cache may skip blocks in its passes.
            cache, compiled: see `messages.Sample`.
        """
        keys_left, networks = iter(keys), iter(zip(self._networks, self.of_network, strict=True))
        program: list[messages.Evaluate | messages.RunNetwork | messages.Report] = []
        for each in self._program.instructions:
            if isinstance(each, Network):
                places, degrees = next(networks)
                passes = [
                    messages.Pass(
                        request=one.request.message(**place, held=next(keys_left)),
                        latents=list(one.latents),
                        results=list(one.results),
                    )
                    for place, one in zip(places, each.passes, strict=True)
                ]
                which = self.degrees.index(degrees)
                program.append(messages.RunNetwork(passes=passes, degrees=which, active=is_active(each.sigma)))
            else:
                program.append(each)
        return messages.Sample(
            model=model,
            degrees=self.degrees,
            size=self._result.nbytes // torch.float32.itemsize,
            constants=self._constants,
            program=program,
            free=self._program.last_uses(),
            result=self._program.result,
            out=self._result,
            previews=self._previews,
            kept=self._kept,
            conditioning=conditioning,
            cache=cache,
            compile=compiled,
        )

    @property
    def previews(self) -> int:
        """Number of previews written so far."""
        return int(self._counts[0, 0])

    def followed(self, on_step: OnStep | None, on_progress: Progress | None) -> Progress:
        """Returns the progress callback for `WorkerGroup.call`: passes the latest complete preview to `on_step` and
        requests the next one; passes the number of steps done without a preview to `on_progress`."""
        seen = told = 0

        def progress(done: int, total: int) -> None:
            nonlocal seen, told
            counts = self._counts.clone()
            (count, step), device = counts[0].tolist(), self._program.device
            if on_step is not None and (counts == counts[0]).all() and count != seen:
                seen, told = count, max(told, step + 1)
                denoised, x = (self._segment.tensor(ref).to(device, copy=True) for ref in self._shown[count % 2])
                self._wanted.fill_(count + 1)
                on_step(step, denoised, x, total)
            if on_progress is not None and done > told:
                told = done
                on_progress(done, total)

        return progress

    def result(self) -> Tensor:
        """Returns a copy of the result on the program's device."""
        return self._segment.tensor(self._result).to(self._program.device, copy=True)

    @property
    def reported_before(self) -> int:
        """Number of steps done before this program began."""
        first = next((each for each in self._program.instructions if isinstance(each, messages.Report)), None)
        return 0 if first is None else first.step

    def rest(self) -> Program:
        """Returns the rest of the program after the workers are lost; all of it if no finished step was kept."""
        place = int(self._done.min())
        if self._kept is None or place < 0:
            return self._program
        row = self._kept.latents[list(self._places_kept).index(place) % 2]
        numbers = self._places_kept[place]
        latents = {
            number: self._segment.tensor(ref).clone() for number, ref in zip(numbers, row[: len(numbers)], strict=True)
        }
        return self._program.rest(place, latents)

    def clear(self) -> None:
        """Returns the memory to the system: the noise of all steps may take gigabytes."""
        self._segment.clear()

    # --- places ---------------------------------------------------------------------------------------------------

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        self._tensors.append((tuple(shape), dtype))
        return len(self._tensors) - 1

    def _copied(self, tensor: Tensor) -> int:
        place = self._room(tensor.shape, tensor.dtype)
        self._copies.append((place, tensor))
        return place

    def _pass_places(self, slot: int, each: Pass) -> dict[str, int]:
        """Allocates x, the timestep and the prediction of a pass; returns their indices.

        Passes that differ only in their latents reuse the same tensors one after another; passes of one instruction
        do not.
        """
        x = each.request.x
        key = (slot, tuple(x.shape), x.dtype, id(each.concat))
        if key not in self._places:
            self._places[key] = (
                self._room(x.shape, x.dtype),
                self._room(each.output_shape, OUTPUT_DTYPE),
            )
        timestep = each.request.timestep
        if id(timestep) not in self._timesteps:  # the recorder makes one tensor for each value
            self._timesteps[id(timestep)] = self._copied(timestep)
        place, out = self._places[key]
        return {"x": place, "timestep": self._timesteps[id(timestep)], "out": out}

    def _concatenate(self, refs: Sequence[TensorRef]) -> None:
        """Writes the channels that follow the latent's in x, once for all passes."""
        concats = {id(p.concat): p.concat for network in self._program.networks for p in network.passes}
        for (_, _, _, concat), (place, _) in self._places.items():
            if (channels := concats[concat]) is not None:
                self._segment.tensor(refs[place])[:, -channels.shape[1] :].copy_(channels)
