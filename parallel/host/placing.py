"""Decides on the placement of a model's weights, together with the workers that will hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..config import Layout, SequenceParallelConfig
from ..placement import Memory, Placement, bytes_on_device, check_host_memory, choose, next_smaller
from ..wire.messages import FreeMemory, WeightsHome
from .calls import Poll
from .group import WorkerGroup


class Placing:
    """Placement of the weights under one configuration.

    Args:
        config: the user's settings.
        layout: `config` resolved for this machine.
        whole: True forces `replicate`, the only possible mode, whatever `config.weights` says.
    """

    def __init__(self, config: SequenceParallelConfig, layout: Layout, *, whole: bool = False):
        self._asked = "replicate" if whole else config.weights
        self._sharing, self._device_type = layout.degrees.sharing, layout.device_type
        self._ran_out: set[str] = set()

    def ran_out(self, mode: str) -> None:
        """Records that memory ran out in this mode, so that `auto` does not choose it again."""
        self._ran_out.add(mode)

    def next_smaller(self, mode: str, nbytes: int, in_the_file: int) -> str | None:
        """Returns `auto`'s next choice if `mode` runs out of memory; None if none needs less or the user chose one."""
        if self._asked != "auto":
            return None
        kind = self._device_type
        return next_smaller(mode, nbytes, sharing=self._sharing, device_type=kind, in_the_file=in_the_file)

    def settle(self, group: WorkerGroup, poll: Poll | None, nbytes: int, *, in_the_file: int = 0) -> Placement:
        """Chooses the mode; asks the workers for their free memory only if the choice depends on it.

        Args:
            nbytes: bytes of a whole copy of the weights.
            in_the_file: bytes of these that CPU workers use directly in the mapped file.

        Raises:
            ConfigError: an offload needs more memory than the host has.
        """
        placement = Placement(mode=self._asked, reason="as asked")
        if self._asked in ("replicate", "shard"):
            return placement
        answers = group.call(FreeMemory(), poll=poll)
        host = Memory(**answers[0]["host"])
        if self._asked == "auto":
            placement = choose(
                nbytes,
                [Memory(**answer["device"]) for answer in answers],
                host,
                sharing=self._sharing,
                device_type=self._device_type,
                in_the_file=in_the_file,
                ran_out=self._ran_out,
            )
        if placement.mode == "offload":
            check_host_memory(nbytes, host, placement.reason)
        return placement

    @contextmanager
    def home(self, placement: Placement, model: str, group: WorkerGroup, poll: Poll | None) -> Iterator[WeightsHome]:
        """Yields the description of a placement for the workers, which must load inside the `with` block.

        Args:
            model: name of the model that they load.
        """
        home = WeightsHome(mode=placement.mode, sharing=self._sharing)
        if placement.mode != "offload":
            yield home
            return
        segment = f"{model}-weights"
        group.settle(poll)
        group.memory.segment(segment, 0)  # the workers know how much they need
        try:
            yield replace(home, segment=segment)
        finally:
            group.memory.drop(segment)  # the workers own it now

    def expected_bytes(self, nbytes: int, mode: str | None = None) -> int:
        """Returns the bytes of loaded weights on one worker's device; under `auto` the maximum.

        Args:
            nbytes: bytes of a whole copy.
            mode: the chosen mode; by default the requested one.
        """
        return bytes_on_device(mode or self._asked, nbytes, self._sharing, self._device_type)
