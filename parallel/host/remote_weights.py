"""The weights of a model in the workers, as the host holds them: load, replace, unload."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from math import prod

import torch

from ..adapters.native import NativeTensors
from ..checkpoints.source import Stored
from ..quantise.selection import Selection, select
from ..quantise.settings import FP8Settings, likely_scheme, refuse_devices
from ..wire.shared import lay_out
from . import running
from .group import Poll, Progress, WorkerGroup
from .held_weights import HeldWeights
from .recipe import Inspected, Recipe, inspect, weight_bytes

_MODELS = itertools.count(1)
_BATCH_BYTES = 64 * 2**20
"""Replaced weights that travel together; a larger one travels alone."""

Replace = Callable[[str, Stored], Stored]
"""Name and tensor of the checkpoint → what the workers are to use, of the same shape and dtype, with a scale of its own
if there was one. Without a scale the tensor is in the storage dtype. It must not be written to: it may be the file."""


class RemoteWeights(HeldWeights):
    """The weights of one recipe, and where they are now.

    They may come and go (eviction, a crash, another layout): `ensure_loaded` brings them back.

    Args:
        recipe: what to load.
        inspected: the checkpoint's header, if it has been read already.
        group: use this group instead of the shared one of the recipe's configuration.
    """

    def __init__(self, recipe: Recipe, inspected: Inspected | None = None, group: WorkerGroup | None = None):
        self.recipe = recipe
        self.inspected = inspected or inspect(recipe.path)
        super().__init__(f"model-{next(_MODELS)}", recipe.path, recipe.config, self.inspected.adapter.family)
        self._own_group = group
        self._selections: dict[FP8Settings, Selection] = {}
        self._tensors = NativeTensors(self.inspected.source, self.inspected.adapter, self.inspected.model_config)
        self._version: Hashable = None
        self._replaced: set[str] = set()
        """Tensors that are, or may be, other than the checkpoint's in the workers."""

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
        family = self.inspected.adapter.family
        group = self._own_group or running.acquire(self.recipe.config, poll, family=family)
        return self._load_into(group, "load", {"recipe": self.recipe.to_json()}, fp8, poll, on_progress)

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

    def _forgotten(self) -> None:
        self._version = None
        self._replaced.clear()


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
