"""Host side of one model's weights in the workers: loads, replaces and unloads them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..config import resolve
from ..errors import UnsupportedError, WorkerOutOfMemoryError
from ..placement import Placement
from ..quantise.selection import Selection, select_layers
from ..quantise.settings import KITCHEN, NODE, FP8Report, FP8Settings, choose_scheme, likely_scheme, refuse_devices
from ..wire import messages
from ..wire.plain import plain_tensors
from ..wire.trees import Tree, flatten
from . import running, status
from .calls import Poll, Progress
from .failures import advice_after
from .group import WorkerGroup
from .placing import Placing
from .recipe import Recipe
from .resident import Resident
from .sampling import SEGMENT

log = logging.getLogger("sequence_parallel")

_MODELS = itertools.count(1)
_BATCH_BYTES = 64 * 2**20
"""Maximum bytes of replaced weights in one message; a larger weight has a message of its own."""


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches that a layer applies whenever it dequantises a weight; the weight's own bytes stay in the workers."""

    nest: Any
    """Nest of lists, dictionaries, tensors and plain data (`comfyui.gguf.plain_patches`)."""


Replace = Callable[[str], Tensor | Patches]
"""Maps a weight's name to its replacement: a tensor of its shape (for a quantised weight, of its class) or patches."""


class RemoteWeights(Resident):
    """Weights of one model in the workers: their group, placement, quantisation and replacements.

    Args:
        recipe: describes the model to load.
        group: group to use instead of the shared one of the recipe's configuration.

    Attributes:
        placement: current or last placement of the weights, and its reason.
        fp8: current or last settings by which the weights are quantised while loading; None without.
        fp8_report: report on the quantisation of the last load; None without.
        on_change: called when the workers have dropped the model or loaded its weights.

    Raises:
        ConfigError: the configuration does not fit this machine.
    """

    def __init__(self, recipe: Recipe, group: WorkerGroup | None = None):
        name = f"model-{next(_MODELS)}"
        super().__init__(name, messages.Unload(model=name))
        self.recipe = recipe
        self.placement: Placement | None = None
        self.fp8: FP8Settings | None = None
        self.fp8_report: FP8Report | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.layout = resolve(recipe.config)
        self._placing = Placing(recipe.config, self.layout, whole=not recipe.planned)
        self._own_group = group
        self._version: Hashable = None
        self._smaller: str | None = None
        """Mode that `auto` would choose next if memory runs out in the current one; None if there is none."""
        self._too_large = False
        """True if memory has run out and there is such a mode: the next prompt reloads the weights."""
        self._replaced: set[str] = set()
        """Names of weights in the workers that differ, or may differ, from the file's."""

    @property
    def sharded(self) -> bool:
        """True if the weights are sharded over the ranks of a sequence."""
        return (self.placement.mode if self.placement else self.recipe.config.weights) == "shard"

    def expected_bytes(self, fp8: FP8Settings | None = None) -> int:
        """Returns the bytes of loaded weights on one worker's device; under `auto` the maximum."""
        if self.loaded and fp8 == self.fp8:
            return self.nbytes
        return self._placing.expected_bytes(self._whole_bytes(fp8))

    def select_fp8(self, fp8: FP8Settings) -> Selection:
        """Selects the layers that `fp8` will quantise, without asking the workers.

        Raises:
            UnsupportedError: the file is quantised already, and ComfyUI's layers compute in its own format; or the
                class has no split plan; or the scheme is ComfyUI's, and the model another library's.
            ConfigError: the devices do not support the scheme, or a pattern of `skip` matches no layer.
        """
        recipe = self.recipe
        if recipe.quantised:
            raise UnsupportedError(
                f"{NODE} cannot quantise {recipe.network} of {recipe.path}: the file is quantised already"
                f" ({recipe.quantised}); remove the node, or use a bf16 or fp16 file"
            )
        if not recipe.planned:
            raise UnsupportedError(
                f"{NODE} cannot quantise {recipe.network}: a split plan names the layers that may be quantised, and"
                " this class has none; remove the node, or choose weight_dtype fp8_e4m3fn in the loader"
            )
        if fp8.scheme in KITCHEN and recipe.library != "comfyui":
            raise UnsupportedError(f"{NODE}: scheme {fp8.scheme} is ComfyUI's, and {recipe.path} is read without it")
        refuse_devices(fp8, self.layout)
        return select_layers(recipe.linear, scheme=likely_scheme(fp8, self.layout), skip=fp8.patterns)

    def ensure_loaded(
        self,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
        *,
        fp8: FP8Settings | None = None,
        again: bool = False,
    ) -> int:
        """Starts the workers and loads the weights, unless both have been done.

        Args:
            poll: see `WorkerGroup.call`.
            on_progress: called with bytes done and total.
            fp8: quantises the weights while loading; settings other than the current ones reload them.
            again: True after workers with the weights were lost: keeps the last placement, whatever memory is free now,
                so that the degrees, and with them all bits of the results, stay the same.

        Returns:
            Bytes of weights on one worker.

        Raises:
            UnsupportedError: see `select_fp8`.
            ConfigError: an offload needs more memory than the host has, or the devices do not support `fp8`.
            WorkerError: loading failed.
        """
        if fp8 is not None:
            self.select_fp8(fp8)  # refuses before any worker is started
        recipe = self.recipe
        group = self._own_group or running.acquire(recipe.config, poll, first=recipe.to_json())
        if self.loaded and group is self.group and fp8 == self.fp8 and not self._too_large:
            return self.nbytes
        nbytes = self._whole_bytes(fp8)
        choice = None
        if fp8 is not None:
            support = [result["support"] for result in group.call(messages.FP8Support(), poll=poll)]
            choice = choose_scheme(fp8, group.layout, support)
        self.unload()  # makes room: frees weights loaded under other settings
        in_the_file = recipe.in_the_file if fp8 is None else 0
        placement = self.placement if again else None
        placement = placement or self._placing.settle(group, poll, nbytes, in_the_file=in_the_file)
        with self._placing.home(placement, self.name, group, poll) as home:
            message = messages.Load(
                model=self.name,
                recipe=recipe.to_json(),
                home=home,
                fp8=None if choice is None else choice.to_json(),
            )
            self.placement, self._too_large = placement, False
            self._smaller = self._placing.next_smaller(placement.mode, nbytes, in_the_file)
            try:
                results = group.call(message, poll=poll, on_progress=on_progress, advice=self.advice)
            except WorkerOutOfMemoryError:
                self.ran_out()
                raise
        self.fp8 = fp8
        self._forgotten()
        self._arrived(group, recipe.path, max(result["nbytes"] for result in results))
        group.figures.loaded([result["seconds"] for result in results])
        log.info(
            "%s: %s, weights %s (%s): %.0f MiB %s; loaded in %s",
            recipe.path, recipe.network, placement.mode, placement.reason, self.nbytes / 2**20,
            "in one copy for all workers"
            if placement.mode == "offload" and self.layout.device_type == "cpu"
            else f"on each of {len(results)} workers",
            status.phases_text(group.figures.load),
        )  # fmt: skip
        self.fp8_report = None
        if choice is not None:
            counts = dict(results[0]["fp8"])
            before = self.nbytes + self._placing.expected_bytes(counts.pop("saved"), placement.mode)
            self.fp8_report = FP8Report(
                scheme=choice.scheme, reason=choice.reason, bytes_before=before, bytes_after=self.nbytes, **counts
            )
        return self.nbytes

    @property
    def advice(self) -> str:
        """Advice to the user for the case that memory runs out under the current placement; see `ran_out`."""
        return advice_after(self._smaller)

    def ran_out(self) -> None:
        """Records that memory ran out: under `auto`, the next prompt uses a mode that needs less, if there is one."""
        if self._smaller is not None:
            assert self.placement is not None
            self._placing.ran_out(self.placement.mode)
            self._too_large = True

    def replace(
        self,
        version: Hashable,
        names: Collection[str],
        replace: Replace,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Replaces the weights `names` in the workers; weights replaced before and not in `names` are restored.

        Every replacement starts from the file's weight, so nothing of earlier replacements is left in it.

        Args:
            version: identifies `names` and `replace`; if it is the current version, nothing is done. None is the file
                itself, without replacements.
            names: names of weights in the network.
            replace: returns the replacement of one weight; runs in the caller's thread, for one weight at a time.
            poll: see `WorkerGroup.call`; also called before each weight.
            on_progress: called with the number of weights done and of all.

        Raises:
            WorkerError: a worker failed; the next call starts over. Its `remote_type` is CheckpointError if there is no
                such weight, or its replacement does not fit.
        """
        if version == self._version:
            return
        group = self.settled(poll)
        self._version = object()  # equal to no caller's: if this ends early, the next call repeats all of it
        if restored := sorted(self._replaced - set(names)):
            group.call(messages.Weights(model=self.name, restore=restored), poll=poll)
            self._replaced -= set(restored)
        done = 0
        for batch in _batches(_made(sorted(names), replace, poll)):
            group.settle(poll)
            places = iter(group.memory.write("weights", [piece for made in batch for piece in made.pieces.values()]))
            message = messages.Weights(model=self.name)
            for made in batch:
                refs = {path: next(places) for path in made.pieces}
                if made.patches is None:
                    message.put[made.name] = list(refs.values())
                else:
                    message.patches[made.name] = made.patches
                    message.tensors.update(refs)
            self._replaced |= {made.name for made in batch}
            group.call(message, poll=poll)
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(names))
        self._version = version

    def unload(self) -> None:
        """Frees the weights (`Resident.unload`), and the noise that a cancelled sampling left in shared memory."""
        group = self.group
        self._forgotten()
        super().unload()
        if group is not None:
            group.memory.clear(SEGMENT)

    def _whole_bytes(self, fp8: FP8Settings | None) -> int:
        """Returns the bytes of a whole copy of the weights."""
        return self.recipe.nbytes - (0 if fp8 is None else self.select_fp8(fp8).saved)

    def _forgotten(self) -> None:
        self._version = None
        self._replaced.clear()
        self.on_change()


class Made(NamedTuple):
    """Replacement of one weight, ready to be sent."""

    name: str
    pieces: dict[str, Tensor]
    """Plain tensors of its value, in order; or the tensors of its patches, by their names in `patches`."""
    patches: Tree | None = None


def _made(names: Iterable[str], replace: Replace, poll: Poll | None) -> Iterator[Made]:
    for name in names:
        if poll is not None:
            poll()
        value = replace(name)
        if isinstance(value, Patches):
            tensors: dict[str, Tensor] = {}
            tree = flatten(value.nest, name, tensors)
            yield Made(name, tensors, tree)
        else:
            yield Made(name, {str(number): piece for number, piece in enumerate(plain_tensors(value))})


def _batches(weights: Iterable[Made]) -> Iterator[list[Made]]:
    """Groups the weights into batches of at most `_BATCH_BYTES`; a larger weight is a batch of its own."""
    batch: list[Made] = []
    room = _BATCH_BYTES
    for made in weights:
        size = sum(piece.nbytes for piece in made.pieces.values())
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append(made)
        room -= size
    if batch:
        yield batch
