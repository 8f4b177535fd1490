"""The weights of one model in the workers, as the host holds them: load, replace, unload."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator

from torch import Tensor

from ..config import resolve
from ..errors import UnsupportedError, WorkerError
from ..placement import Placement
from ..quantise.selection import Selection, select_layers
from ..quantise.settings import NODE, FP8Report, FP8Settings, likely_scheme, refuse_devices
from ..wire import messages
from ..wire.plain import plain_tensors
from ..wire.shared import lay_out
from . import quantising, running, status
from .group import Poll, Progress, WorkerGroup
from .placing import Placing
from .recipe import Recipe
from .sampling import SEGMENT

log = logging.getLogger("sequence_parallel")

_MODELS = itertools.count(1)
_BATCH_BYTES = 64 * 2**20
"""Replaced weights that travel together; a larger one travels alone."""

Replace = Callable[[str], Tensor]
"""Name of a weight → what the workers are to use, of its shape; of a quantised one a tensor of its own class."""


class RemoteWeights:
    """Where the weights of one model are: in which group of workers, how, and since when.

    They may come and go (eviction, a crash, another layout): `ensure_loaded` brings them back.

    Args:
        recipe: what to load.
        group: use this group instead of the shared one of the recipe's configuration.

    Attributes:
        name: of the model in the workers.
        nbytes: bytes of weights that one worker has on its device; 0 when not loaded.
        placement: where the weights are, or were last, and why.
        fp8: by which settings they are, or were last, quantised on the way.
        fp8_report: what has been quantised, of the weights that were loaded last.
        on_change: called when the workers have nothing of this model any more, or new weights.

    Raises:
        ConfigError: the configuration does not fit this machine.
    """

    def __init__(self, recipe: Recipe, group: WorkerGroup | None = None):
        self.recipe = recipe
        self.name = f"model-{next(_MODELS)}"
        self.nbytes = 0
        self.placement: Placement | None = None
        self.fp8: FP8Settings | None = None
        self.fp8_report: FP8Report | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.layout = resolve(recipe.config)
        self._placing = Placing(recipe.config, self.layout, whole=not recipe.planned)
        self._own_group = group
        self._group: WorkerGroup | None = None
        self._generation = 0
        self._version: Hashable = None
        self._replaced: set[str] = set()
        """Weights that are, or may be, other than the file's in the workers."""

    @property
    def loaded(self) -> bool:
        """Whether the workers hold the weights."""
        return self._group is not None and self._group.alive and self._group.generation == self._generation

    @property
    def group(self) -> WorkerGroup | None:
        """The workers that it was last loaded in."""
        return self._group

    @property
    def sharded(self) -> bool:
        """Whether the ranks of a sequence share the weights."""
        return (self.placement.mode if self.placement else self.recipe.config.weights) == "shard"

    def expected_bytes(self, fp8: FP8Settings | None = None) -> int:
        """Of weights on one worker's device when they are loaded; under `auto` as much as it may be."""
        if self.loaded and fp8 == self.fp8:
            return self.nbytes
        return self._placing.expected_bytes(self._whole_bytes(fp8))

    def select_fp8(self, fp8: FP8Settings) -> Selection:
        """What `fp8` will do to this model, told without workers.

        Raises:
            UnsupportedError: the file is quantised: its own format is what ComfyUI's layers compute in; or its class
                has no plan.
            ConfigError: the devices cannot do it, or `skip` has a pattern that means no layer.
        """
        recipe = self.recipe
        if recipe.quantised:
            raise UnsupportedError(
                f"{NODE} cannot quantise {recipe.network} of {recipe.path}: the file is quantised already"
                f" ({recipe.quantised}); remove the node, or use a bf16 or fp16 file"
            )
        if not recipe.planned:
            raise UnsupportedError(
                f"{NODE} does not know which layers of {recipe.network} it may quantise, a class without a split plan;"
                " remove the node, or choose weight_dtype fp8_e4m3fn in the loader"
            )
        refuse_devices(fp8, self.layout)
        return select_layers(recipe.linear, scheme=likely_scheme(fp8, self.layout), skip=fp8.patterns)

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
            UnsupportedError: see `select_fp8`.
            ConfigError: an offload needs more memory than the host has, or the devices cannot do what `fp8` asks for.
            WorkerError: loading failed.
        """
        if fp8 is not None:
            self.select_fp8(fp8)  # refuses before any worker is started
        recipe = self.recipe
        group = self._own_group or running.acquire(recipe.config, poll, first=recipe.to_json())
        if self.loaded and group is self._group and fp8 == self.fp8:
            return self.nbytes
        nbytes = self._whole_bytes(fp8)
        choice = quantising.choose(fp8, group, poll)
        self.unload()  # what is loaded otherwise makes room for this
        in_the_file = recipe.in_the_file if fp8 is None else 0
        placement = self._placing.settle(group, poll, nbytes, in_the_file=in_the_file)
        with self._placing.home(placement, self.name, group, poll) as home:
            message = messages.Load(
                model=self.name,
                recipe=recipe.to_json(),
                home=home,
                fp8=None if choice is None else choice.to_json(),
            )
            results = group.call(message, poll=poll, on_progress=on_progress)
        self._group, self._generation, self.placement, self.fp8 = group, group.generation, placement, fp8
        self._forgotten()
        self.nbytes = max(result["nbytes"] for result in results)
        group.figures.holds(self.name, recipe.path, self.nbytes)
        group.figures.loaded([result["seconds"] for result in results])
        log.info(
            "%s: %s, weights %s (%s): %.0f MiB %s; loaded in %s",
            recipe.path, recipe.network, placement.mode, placement.reason, self.nbytes / 2**20,
            "in one copy for all workers"
            if placement.mode == "offload" and self.layout.device_type == "cpu"
            else f"on each of {len(results)} workers",
            status.phases_text(group.figures.load),
        )  # fmt: skip
        self.fp8_report = quantising.report(choice, results[0]["fp8"], self._placing, placement, self.nbytes)
        return self.nbytes

    def replace(
        self,
        version: Hashable,
        names: Collection[str],
        replace: Replace,
        *,
        poll: Poll | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Makes the weights in the workers the file's but for some. Only those and the last ones change.

        Every weight is replaced starting from the file's, so nothing of earlier replacements is left in it.

        Args:
            version: what `names` and `replace` stand for; with the one that is in place nothing is done. None is the
                file itself, and has no names.
            names: of weights, as the network has them.
            replace: runs in the caller's thread, for one weight at a time.
            poll: see `WorkerGroup.call`; also called before each weight.
            on_progress: told in weights.

        Raises:
            CheckpointError: there is no such weight, or its replacement does not fit it.
            WorkerError: a worker failed; the next call starts over.
        """
        if version == self._version:
            return
        group = self._group
        assert group is not None, "call ensure_loaded first"
        self._version = object()  # no caller's: whatever ends this early, the next call does it all
        if restored := sorted(self._replaced - set(names)):
            group.call(messages.Weights(model=self.name, restore=restored), poll=poll)
            self._replaced -= set(restored)
        done = 0
        for batch in _batches(_made(sorted(names), replace, poll)):
            group.settle(poll)
            tensors = [piece for _, pieces in batch for piece in pieces]
            refs, size = lay_out("weights", [(piece.shape, piece.dtype) for piece in tensors])
            segment = group.memory.segment("weights", size)
            for piece, ref in zip(tensors, refs, strict=True):
                segment.tensor(ref).copy_(piece)
            places = iter(refs)
            put = {name: [next(places) for _ in pieces] for name, pieces in batch}
            self._replaced |= put.keys()
            group.call(messages.Weights(model=self.name, put=put), poll=poll)
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(names))
        self._version = version

    def unload(self) -> None:
        """Frees the weights in the workers; the processes stay."""
        group, was_loaded = self._group, self.loaded
        self._group, self._generation, self.nbytes = None, 0, 0
        self._forgotten()
        if group is not None and was_loaded:
            group.figures.dropped(self.name)
            try:
                # A sampling that was cancelled has left its noise.
                group.call(messages.Unload(model=self.name, drop=[SEGMENT]))
                group.memory.drop(SEGMENT)
            except WorkerError as error:  # the weights have gone with the workers
                log.warning("%s", error)

    def release(self) -> None:
        """As `unload`, without waiting: for a finalizer, which may run in the middle of anything."""
        if self._group is not None and self.loaded:
            self._group.figures.dropped(self.name)
            self._group.post(messages.Unload(model=self.name))
        self._group, self._generation = None, 0

    def _whole_bytes(self, fp8: FP8Settings | None) -> int:
        """Of a whole copy of the weights."""
        return self.recipe.nbytes - (0 if fp8 is None else self.select_fp8(fp8).saved)

    def _forgotten(self) -> None:
        self._version = None
        self._replaced.clear()
        self.on_change()


Made = tuple[str, list[Tensor]]
"""A weight's name, and what it consists of."""


def _made(names: Iterable[str], replace: Replace, poll: Poll | None) -> Iterator[Made]:
    for name in names:
        if poll is not None:
            poll()
        yield name, plain_tensors(replace(name))


def _batches(weights: Iterable[Made]) -> Iterator[list[Made]]:
    """In groups of at most `_BATCH_BYTES`, or of one."""
    batch: list[Made] = []
    room = _BATCH_BYTES
    for name, pieces in weights:
        size = sum(piece.nbytes for piece in pieces)
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        batch.append((name, pieces))
        room -= size
    if batch:
        yield batch
