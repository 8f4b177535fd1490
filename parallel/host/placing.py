"""Settles where a model's weights go, with the workers that are to have them."""

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
    """Of the weights of one configuration.

    Args:
        config: what the user asks for.
        layout: what it means.
        whole: no other place is possible; the user has not asked for one.
    """

    def __init__(self, config: SequenceParallelConfig, layout: Layout, *, whole: bool = False):
        self._asked = "replicate" if whole else config.weights
        self._sharing, self._device_type = layout.degrees.sharing, layout.device_type
        self._ran_out: set[str] = set()

    def ran_out(self, mode: str) -> None:
        """Memory has run out in this mode: `auto` does not take it again."""
        self._ran_out.add(mode)

    def next_smaller(self, mode: str, nbytes: int, in_the_file: int) -> str | None:
        """What `auto` takes where `mode` runs out of memory; None: nothing leaves more, or the user has chosen."""
        if self._asked != "auto":
            return None
        kind = self._device_type
        return next_smaller(mode, nbytes, sharing=self._sharing, device_type=kind, in_the_file=in_the_file)

    def settle(self, group: WorkerGroup, poll: Poll | None, nbytes: int, *, in_the_file: int = 0) -> Placement:
        """Asks the workers for their free memory only if that matters.

        Args:
            nbytes: of a whole copy of the weights.
            in_the_file: how many of these CPU workers use where the file is mapped.

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
        """What the workers are told of a placement, inside the `with` block in which they load.

        Args:
            model: name of what they load.
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
            group.memory.drop(segment)  # it belongs to the workers now

    def expected_bytes(self, nbytes: int, mode: str | None = None) -> int:
        """Of weights on one worker's device when they are loaded; under `auto` as much as it may be.

        Args:
            nbytes: of a whole copy.
            mode: where they are, once that is settled.
        """
        return bytes_on_device(mode or self._asked, nbytes, self._sharing, self._device_type)
