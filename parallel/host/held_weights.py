"""Where the weights of one model are: in which group of workers, how, and since when."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

from ..config import SequenceParallelConfig, resolve
from ..errors import WorkerError
from ..placement import Placement
from ..quantise.settings import FP8Report, FP8Settings
from . import quantising, status
from .group import Poll, Progress, WorkerGroup
from .placing import Placing
from .sampling import SEGMENT

log = logging.getLogger("sequence_parallel")


class HeldWeights(ABC):
    """They may come and go: eviction, a crash, another layout.

    Args:
        name: of the model in the workers.
        path: of the file.
        config: devices and degrees.
        kind: what the file is, for the log.
    """

    def __init__(self, name: str, path: str, config: SequenceParallelConfig, kind: str):
        self.name = name
        self.nbytes = 0
        """Bytes of weights that one worker has on its device; 0 when not loaded."""
        self.placement: Placement | None = None
        """Where the weights are, or were last, and why."""
        self.fp8_report: FP8Report | None = None
        """What has been quantised, of the weights that were loaded last."""
        self._path, self._kind, self._asked = path, kind, config.weights
        self._layout = resolve(config)
        self._placing = Placing(config, self._layout)
        self._group: WorkerGroup | None = None
        self._generation = 0
        self._fp8: FP8Settings | None = None

    @abstractmethod
    def _whole_bytes(self, fp8: FP8Settings | None) -> int:
        """Of a whole copy of the weights."""

    @abstractmethod
    def _forgotten(self) -> None:
        """What else the workers had of this model has gone with its weights, or the weights are new ones."""

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
        return (self.placement.mode if self.placement else self._asked) == "shard"

    def expected_bytes(self, fp8: FP8Settings | None = None) -> int:
        """Of weights on one worker's device when they are loaded; under `auto` as much as it may be."""
        if self.loaded and fp8 == self._fp8:
            return self.nbytes
        return self._placing.expected_bytes(self._whole_bytes(fp8))

    def _load_into(
        self,
        group: WorkerGroup,
        operation: str,
        what: dict[str, Any],
        fp8: FP8Settings | None,
        poll: Poll | None,
        on_progress: Progress | None,
        *,
        in_the_file: int = 0,
    ) -> int:
        """Loads the weights into the workers, unless that has been done.

        Args:
            operation, what: the workers', and what it needs to know of the model.
            in_the_file: see `Placing.settle`.

        Returns:
            Bytes of weights on one worker.
        """
        if self.loaded and group is self._group and fp8 == self._fp8:
            return self.nbytes
        nbytes = self._whole_bytes(fp8)
        choice = quantising.choose(fp8, group, poll)
        self.unload()  # what is loaded otherwise makes room for this
        placement = self._placing.settle(group, poll, nbytes, in_the_file=in_the_file)
        message = {"model": self.name, **what, "fp8": None if choice is None else choice.to_json()}
        with self._placing.message(placement, self.name, group, poll) as weights:
            results = group.call(operation, message | {"weights": weights}, poll=poll, on_progress=on_progress)
        self._group, self._generation, self.placement, self._fp8 = group, group.generation, placement, fp8
        self._forgotten()
        self.nbytes = max(result["nbytes"] for result in results)
        group.figures.holds(self.name, self._path, self.nbytes)
        group.figures.loaded([result["seconds"] for result in results])
        log.info(
            "%s: %s, weights %s (%s): %.0f MiB %s; loaded in %s",
            self._path, self._kind, placement.mode, placement.reason, self.nbytes / 2**20,
            "in one copy for all workers"
            if placement.mode == "offload" and self._layout.device_type == "cpu"
            else f"on each of {len(results)} workers",
            status.phases_text(group.figures.load),
        )  # fmt: skip
        self.fp8_report = quantising.report(choice, results[0]["fp8"], self._placing, placement, self.nbytes)
        return self.nbytes

    def unload(self) -> None:
        """Frees the weights in the workers; the processes stay."""
        group, was_loaded = self._group, self.loaded
        self._group, self._generation, self.nbytes = None, 0, 0
        self._forgotten()
        if group is not None and was_loaded:
            group.figures.dropped(self.name)
            try:
                # A sampling that was cancelled has left its noise.
                group.call("unload", {"model": self.name, "drop": [SEGMENT]})
                group.memory.drop(SEGMENT)
            except WorkerError as error:  # the weights have gone with the workers
                log.warning("%s", error)

    def release(self) -> None:
        """As `unload`, without waiting: for a finalizer, which may run in the middle of anything."""
        if self._group is not None and self.loaded:
            self._group.figures.dropped(self.name)
            self._group.post("unload", {"model": self.name, "drop": []})
        self._group, self._generation = None, 0
