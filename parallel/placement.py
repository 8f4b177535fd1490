"""Placement of a model's weights: the modes, their costs, and the choice among them.

- *replicate*: a copy on each device. No weights are transferred.
- *shard*: the ranks of a sequence hold equal parts of every tensor, and gather a block just before they run it.
- *offload*: one copy in the host's memory, shared by all workers. A block is copied to a GPU just before it runs; CPU
  workers compute with the shared copy itself.

The host chooses, once per load, from figures of all ranks, so that the ranks agree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

from .degrees import RequestedDegrees
from .errors import ConfigError

MODES = ("auto", "replicate", "shard", "offload")

PASSING = 0.15
"""Fraction of the weights that shard and offload have on a GPU while a step runs: two blocks, and all outside of the
blocks. An estimate before a model is loaded; FLUX.1 and HunyuanVideo have 0.09, Wan 14B 0.08, Wan 1.3B 0.13."""
_ROOM = 2**30
_ROOM_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of a device or of the host, in bytes."""

    free: int
    total: int

    @property
    def for_weights(self) -> int:
        """Bytes available to weights: 1 GiB and a tenth of the device are left to activations."""
        return self.free - _ROOM - int(_ROOM_SHARE * self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The chosen mode."""

    mode: str
    """One of MODES except `auto`."""
    reason: str


def check(mode: str, degrees: RequestedDegrees) -> None:
    """Refuses a mode that these degrees make impossible.

    Raises:
        ConfigError: shard with one rank per sequence.
    """
    if mode == "shard" and degrees.sharing < 2:
        if degrees.world_size == 1:
            raise ConfigError(
                "weights is 'shard', but devices names one device; allowed are auto, replicate and offload"
            )
        raise ConfigError(
            "weights is 'shard', which divides the weights among the devices that share a sequence (ulysses_degree ×"
            f" ring_degree); with cfg_degree {degrees.cfg or 'auto'} and dp_degree {degrees.dp or 'auto'} each sequence"
            f" has only 1 of the {degrees.world_size} devices. Choose 1 for both and"
            " leave ulysses_degree and ring_degree 0, or choose auto, replicate or offload"
        )


def check_host_memory(nbytes: int, host: Memory, reason: str) -> None:
    """Refuses an offload that would exhaust host memory, so that the system would kill processes.

    Args:
        nbytes: size of the one copy.
        host: memory of the machine.
        reason: reason for the offload.

    Raises:
        ConfigError: the copy does not fit.
    """
    if nbytes > host.free:
        raise ConfigError(
            f"weights 'offload' ({reason}) needs {_gib(nbytes)} of host memory for its copy, and {_gib(host.free)} are"
            " free; use an fp8 file or weight_dtype, more or larger GPUs, or close other programs"
        )


def bytes_on_device(mode: str, nbytes: int, sharing: int, device_type: str) -> int:
    """Estimates the bytes of weights, of `nbytes` in total, that one worker will have on its device between steps.

    Args:
        mode: a mode; `auto` gives the maximum over all modes.
        sharing: number of ranks that share a sequence.
        device_type: `cpu` or `cuda`; for each CPU worker, the one host copy counts in full.
    """
    if mode == "shard":
        return ceil(nbytes / sharing)
    if mode == "offload" and device_type != "cpu":
        return ceil(nbytes * PASSING)
    return nbytes


def next_smaller(mode: str, nbytes: int, *, sharing: int, device_type: str, in_the_file: int = 0) -> str | None:
    """Returns the cheapest mode that leaves more memory to a step than `mode`, or None if there is none.

    Args:
        nbytes, sharing, device_type, in_the_file: as for `choose`.
    """
    if mode == "offload":
        return None
    if device_type == "cpu":
        return "offload" if nbytes > in_the_file else None
    return "shard" if mode == "replicate" and sharing > 1 else "offload"


def choose(
    nbytes: int,
    devices: Sequence[Memory],
    host: Memory,
    *,
    sharing: int,
    device_type: str,
    in_the_file: int = 0,
    ran_out: Collection[str] = (),
) -> Placement:
    """Chooses the mode for `auto`.

    Replicate if every device has room; else shard, if it fits; else offload. CPU workers share one memory, and offload
    costs them nothing. The memory that a step needs besides the weights is not known beforehand, so a mode that has run
    out of memory is not chosen again.

    Args:
        nbytes: size of the model's weights.
        devices: memory of each rank's device.
        host: memory of the machine.
        sharing: number of ranks that share a sequence if the weights are sharded.
        in_the_file: bytes that CPU workers use in the mapped file itself, in one copy that the system can drop.
        ran_out: modes in which a step, or the load, has run out of memory.
    """
    needed = _gib(nbytes)
    before = f"{' and '.join(mode for mode in MODES if mode in ran_out)} ran out of memory" if ran_out else ""
    if device_type == "cpu":
        own = nbytes - in_the_file
        if not own:
            return Placement(mode="replicate", reason=f"auto: all workers use {needed} where the file is mapped")
        copies = f"{len(devices)} × {_gib(own)}"
        if own * len(devices) <= host.for_weights and not before:
            return Placement(mode="replicate", reason=f"auto: {copies} fit in memory")
        why = before or f"{copies} do not fit in {_gib(host.for_weights)} of memory"
        return Placement(mode="offload", reason=f"auto: {why}, so all workers use one copy")
    rank, least = min(enumerate(devices), key=lambda entry: entry[1].for_weights)
    where = f"rank {rank} has {_gib(least.for_weights)} for weights"
    if nbytes <= least.for_weights and not before:
        return Placement(mode="replicate", reason=f"auto: {needed} fit, {where}")
    why = before or f"{needed} do not fit"
    if sharing > 1 and "shard" not in ran_out and nbytes // sharing + int(nbytes * PASSING) <= least.for_weights:
        part = f"1/{sharing} of {needed} fits" if before else f"1/{sharing} of it does"
        return Placement(mode="shard", reason=f"auto: {why}, {part}: {where}")
    too_large = f", nor does 1/{sharing} of it" if sharing > 1 and not before else ""
    return Placement(mode="offload", reason=f"auto: {why}{too_large}: {where}")


def _gib(nbytes: int) -> str:
    return f"{max(0, nbytes) / 2**30:.3g} GiB"
