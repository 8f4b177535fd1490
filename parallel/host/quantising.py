"""FP8 on the host's side of a load: one scheme for all ranks before it, and what became of the model after it."""

from __future__ import annotations

from collections.abc import Mapping

from ..placement import Placement
from ..quantise.settings import FP8Choice, FP8Report, FP8Settings, choose_scheme
from ..wire.messages import FP8Support
from .group import Poll, WorkerGroup
from .placing import Placing


def choose(fp8: FP8Settings | None, group: WorkerGroup, poll: Poll | None) -> FP8Choice | None:
    """The scheme for all ranks, by what each says of its device; None where nothing is to be quantised.

    Raises:
        ConfigError: the devices cannot do it.
    """
    if fp8 is None:
        return None
    found = [result["support"] for result in group.call(FP8Support(), poll=poll)]
    return choose_scheme(fp8, group.layout, found)


def report(
    choice: FP8Choice | None, told: Mapping[str, int] | None, placing: Placing, placement: Placement, nbytes: int
) -> FP8Report | None:
    """What became of a model, for people.

    Args:
        told: by a worker: the counts of `FP8Report`, and what a whole copy `saved`, in bytes.
        nbytes: of weights on one worker.
    """
    if choice is None or told is None:
        return None
    counts = {name: count for name, count in told.items() if name != "saved"}
    return FP8Report(
        scheme=choice.scheme,
        reason=choice.reason,
        bytes_before=nbytes + placing.bytes_on_device(placement, told["saved"]),
        bytes_after=nbytes,
        **counts,
    )
