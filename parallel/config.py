"""The user's request (`SequenceParallelConfig`) and its resolution on this machine (`Layout`)."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from math import inf

import torch

from . import placement, shared_gpu
from .degrees import RequestedDegrees
from .errors import ConfigError

ATTENTION_KERNELS = ("auto", "sdpa", "cudnn", "flash", "sage")
ON_FAILURE = ("error", "retry")
KERNEL_CAPABILITY = (8, 0)
"""The least compute capability of a GPU for FlashAttention, cuDNN's attention and SageAttention."""

_DEVICE = re.compile(r"(?P<type>[a-z]+)(:(?P<index>\d+))?(\*(?P<weight>\d+(\.\d+)?))?")


@dataclass(kw_only=True, slots=True, frozen=True)
class WorkerDevice:
    """One worker's device."""

    name: str
    """`cpu` or `cuda:N`, N counted as the ComfyUI process counts its visible GPUs."""
    weight: float = 1.0
    """Relative speed: a worker of weight 2 owns twice the tokens and heads of a worker of weight 1."""

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]


@dataclass(kw_only=True, slots=True, frozen=True)
class SequenceParallelConfig:
    """The SP Config node as data, not yet compared with this machine."""

    devices: str = "auto"
    """Comma-separated devices, one worker each: `cuda:0,cuda:1`, `cpu,cpu`, `cuda:0*2,cuda:1*1` (relative speeds);
    `auto` is every visible GPU, or one CPU worker on a machine without a GPU."""
    ulysses_degree: int = 0
    """Number of ranks that exchange heads for tokens in attention. 0 chooses; 1 switches it off."""
    ring_degree: int = 0
    """Number of ranks that pass keys and values around a ring. 0 chooses; 1 switches it off."""
    cfg_degree: int = 0
    """2 runs cond and uncond side by side. 0 chooses; 1 switches it off."""
    dp_degree: int = 0
    """Number of groups that share the samples of a batch. 0 chooses; 1 switches it off."""
    weights: str = "auto"
    """Placement of the weights: `replicate` (a copy per device), `shard` (a part per device), `offload` (one copy in
    host memory), or `auto`; see `placement`."""
    attention: str = "auto"
    """Attention kernel: `sdpa`, `cudnn`, `flash`, `sage`, or `auto`."""
    on_failure: str = "error"
    """Reaction to lost workers: `error` ends the prompt, `retry` runs the failed call again, once, on fresh workers."""

    def __post_init__(self) -> None:
        for knob in ("ulysses_degree", "ring_degree", "cfg_degree", "dp_degree"):
            value = getattr(self, knob)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{knob} is {value!r}; allowed are 0 (choose automatically), 1 (off) or more ranks")
        _require_choice("weights", self.weights, placement.MODES)
        _require_choice("attention", self.attention, ATTENTION_KERNELS)
        _require_choice("on_failure", self.on_failure, ON_FAILURE)
        parse_devices(self.devices)


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """The request, resolved to this machine's devices. Each step chooses its degrees, see `RequestedDegrees.choose`."""

    devices: tuple[WorkerDevice, ...]
    degrees: RequestedDegrees
    attention: str
    reason: str
    """Reason for these devices, for the log."""

    @property
    def world_size(self) -> int:
        return len(self.devices)

    @property
    def device_type(self) -> str:
        return self.devices[0].type

    @property
    def speeds(self) -> tuple[float, ...]:
        """Relative speed of each rank."""
        return tuple(device.weight for device in self.devices)

    def same_workers(self, other: Layout) -> bool:
        """Returns True if one group of processes serves both layouts: degrees are no property of the processes."""
        return self.devices == other.devices and self.attention == other.attention

    def uses(self, kind: str, index: int | None) -> bool:
        """Returns True if a worker has the device with torch's type `kind` and this index."""
        return (kind if index is None else f"{kind}:{index}") in {device.name for device in self.devices}

    def describe(self) -> str:
        return ",".join(d.name if d.weight == 1 else f"{d.name}*{d.weight:g}" for d in self.devices)


def parse_devices(text: str) -> tuple[WorkerDevice, ...] | None:
    """Parses a device list; returns None for `auto`.

    Raises:
        ConfigError: the text is not a device list.
    """
    allowed = "allowed are 'auto' or a comma-separated list of cuda:N or cpu, each with an optional *speed"
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"devices is {text!r}; {allowed}")
    if text.strip().lower() == "auto":
        return None
    devices = []
    for item in text.split(","):
        match = _DEVICE.fullmatch(re.sub(r"\s", "", item).lower())
        if match is None or match["type"] not in ("cpu", "cuda"):
            raise ConfigError(f"devices has the item {item.strip()!r}; {allowed}")
        if match["type"] == "cuda" and match["index"] is None:
            raise ConfigError(f"devices has the item {item.strip()!r}; name the GPU, e.g. cuda:0")
        weight = float(match["weight"] or 1)
        if not 0 < weight < inf:
            raise ConfigError(f"devices has the item {item.strip()!r}; the speed after * must be above 0 and finite")
        name = "cpu" if match["type"] == "cpu" else f"cuda:{int(match['index'])}"
        devices.append(WorkerDevice(name=name, weight=weight))
    kinds = sorted({device.type for device in devices})
    if len(kinds) > 1:
        raise ConfigError(f"devices is {text!r}; CPU and GPU workers cannot share one sequence, use one kind")
    names = [device.name for device in devices if device.type == "cuda"]
    for name in names:
        if names.count(name) > 1 and not shared_gpu.allowed():
            raise ConfigError(f"devices names {name} {names.count(name)} times; a GPU can hold one worker")
    return tuple(devices)


def resolve(config: SequenceParallelConfig) -> Layout:
    """Resolves the request on this machine.

    Raises:
        ConfigError: a device does not exist, the devices cannot run the attention kernel, the degrees' product cannot
            be the number of devices, or the weights cannot be placed as requested.
    """
    devices = parse_devices(config.devices)
    reason = "as asked"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices is None:
        devices = tuple(WorkerDevice(name=f"cuda:{i}") for i in range(gpus)) or (WorkerDevice(name="cpu"),)
        reason = f"auto: {gpus} visible GPU{'s' * (gpus > 1)}" if gpus else "auto: no GPU is visible, so one CPU worker"
    for device in devices:
        if device.type == "cuda" and int(device.name.partition(":")[2]) >= gpus:
            exist = ", ".join(f"cuda:{i}" for i in range(gpus)) or "no GPU (only cpu)"
            raise ConfigError(f"devices names {device.name}, which this machine does not have; it has {exist}")

    if config.attention not in ("auto", "sdpa") and devices[0].type != "cuda":
        raise ConfigError(f"attention is {config.attention!r}, which needs CUDA devices; on the CPU use auto or sdpa")
    if config.attention in ("cudnn", "flash", "sage"):
        _require_capability(config.attention, devices)
    if config.attention == "sage" and importlib.util.find_spec("sageattention") is None:
        raise ConfigError(
            "attention is 'sage', but the package sageattention is not installed in this Python;"
            " install it, or use auto, sdpa, cudnn or flash"
        )
    degrees = RequestedDegrees(
        world_size=len(devices),
        dp=config.dp_degree,
        cfg=config.cfg_degree,
        ring=config.ring_degree,
        ulysses=config.ulysses_degree,
    )
    placement.check(config.weights, degrees)
    return Layout(devices=devices, degrees=degrees, attention=config.attention, reason=reason)


def _require_capability(attention: str, devices: tuple[WorkerDevice, ...]) -> None:
    for device in devices:
        capability = torch.cuda.get_device_capability(device.name)
        if capability < KERNEL_CAPABILITY:
            raise ConfigError(
                f"attention is {attention!r}, which needs GPUs of compute capability {_dotted(KERNEL_CAPABILITY)} or"
                f" later; {device.name} has {_dotted(capability)}: use auto or sdpa"
            )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _require_choice(knob: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{knob} is {value!r}; allowed are {', '.join(allowed)}")
