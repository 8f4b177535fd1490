"""Settings of the FP8 node, and the choice of a scheme for the group's devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import Layout
from ..errors import ConfigError

NODE = "FP8 Quantize (SP)"
DYNAMIC = ("dynamic_rowwise", "dynamic_tensorwise")
"""Schemes that multiply in FP8: activations are rounded too, with scales computed at each call. The first is better."""
TENSORWISE = DYNAMIC[1]
"""Only scheme outside `KITCHEN` with one scale for a whole weight; the others have one for each of its rows."""
WEIGHT_ONLY = "weight_only"
KITCHEN = {"int8_convrot": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""Maps comfy-kitchen's schemes, as in ComfyUI's quantised files, to ComfyUI's names. Never chosen by `auto`."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCHEMES = ("auto", *DYNAMIC, WEIGHT_ONLY, *KITCHEN)
CAPABILITY = (8, 9)
"""Lowest CUDA compute capability of GPUs that multiply in FP8 (Ada; then Hopper and Blackwell)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Settings:
    """Inputs of the node."""

    scheme: str = "auto"
    """Scheme: `dynamic_rowwise` (a scale per token and per output channel), `dynamic_tensorwise` (one per tensor),
    `weight_only` (saves memory, computes as before), `auto` (the first of these that all devices support), or one of
    `KITCHEN`, run by ComfyUI's own layers: 8-bit integers after a rotation, FP8 with a scale per 32 values, FP4 with
    one per 16. Devices that do not compute in the format dequantise the weights at each call."""
    skip: str = ""
    """Comma-separated patterns of layers to leave as they are, besides those that are never quantised; see
    `selection.matches`."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(f"scheme is {self.scheme!r}; allowed are {', '.join(SCHEMES)}")
        if not isinstance(self.skip, str):
            raise ConfigError(f"skip is {self.skip!r}; allowed is a text: comma-separated patterns of layer names")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns in `skip`, without surrounding blanks."""
        return tuple(pattern for part in self.skip.split(",") if (pattern := part.strip()))


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Choice:
    """Scheme and patterns that all ranks use."""

    scheme: str
    """Any scheme but `auto`."""
    skip: tuple[str, ...]
    """Patterns of layers to leave as they are, from `FP8Settings.patterns`."""
    reason: str = ""
    """Reason for the scheme, if `auto` has chosen it."""

    def to_json(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "skip": list(self.skip)}


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Report:
    """Result of quantising a model, on each worker."""

    scheme: str
    reason: str
    layers: int
    """Number of linear layers whose weights have been quantised."""
    already: int
    """Number of layers that the file or the loader stores in FP8 and that this scheme leaves as they are."""
    skipped: int
    """Number of layers left as they are because they are never quantised or match `skip`."""
    unfit: int
    """Number of layers left as they are because the scheme's kernels need sizes in multiples of 16 or 32."""
    restored: int
    """Number of quantised layers that dequantise at each call: the device does not compute in their format."""
    bytes_before: int
    """Bytes of all weights on one worker without the node."""
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        counts = {
            "in FP8 already": self.already,
            "left as they are (never quantised, or matched by skip)": self.skipped,
            f"left as they are because {self.scheme} needs sizes in multiples of 16 or 32": self.unfit,
            "restored at each call because this device does not compute in their format": self.restored,
        }
        left = "".join(f", {count} {why}" for why, count in counts.items() if count)
        why = f" ({self.reason})" if self.reason else ""
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return (
            f"{NODE}: {self.scheme}{why}: {self.layers} layers quantised{left}; weights on each device"
            f" {before:,.1f} MiB before, {after:,.1f} MiB after"
        )


def refuse_devices(settings: FP8Settings, layout: Layout) -> None:
    """Refuses, before any work, a dynamic scheme on devices without FP8; `choose_scheme` also considers their kernels.

    Raises:
        ConfigError: the scheme is dynamic, and a device has no FP8 arithmetic.
    """
    if settings.scheme not in DYNAMIC:
        return
    for device in layout.devices:
        if lack := _lack(device.name):
            raise _refusal(settings.scheme, f"{device.name}: {lack}", "auto or weight_only")


def likely_scheme(settings: FP8Settings, layout: Layout) -> str:
    """Returns the scheme that `choose_scheme` will choose if the devices' kernels work."""
    if settings.scheme != "auto":
        return settings.scheme
    return WEIGHT_ONLY if any(_lack(device.name) for device in layout.devices) else DYNAMIC[0]


def choose_scheme(settings: FP8Settings, layout: Layout, found: Sequence[Mapping[str, str]]) -> FP8Choice:
    """Chooses one scheme for all ranks.

    Args:
        found: `support` of each rank: maps dynamic schemes to the reason why they do not work there; empty if they do.

    Raises:
        ConfigError: the requested scheme does not work on a device.
    """
    ranks = list(zip(layout.devices, found, strict=True))
    problems = {
        scheme: next((f"{device.name}: {why[scheme]}" for device, why in ranks if why[scheme]), "")
        for scheme in DYNAMIC
    }
    if settings.scheme != "auto":
        if problem := problems.get(settings.scheme):
            works = [scheme for scheme in DYNAMIC if not problems[scheme]]
            raise _refusal(settings.scheme, problem, ", ".join(["auto", *works, WEIGHT_ONLY]))
        return FP8Choice(scheme=settings.scheme, skip=settings.patterns)
    scheme = next((scheme for scheme in DYNAMIC if not problems[scheme]), WEIGHT_ONLY)
    reason = f"chosen because {problems[DYNAMIC[0]]}" if scheme != DYNAMIC[0] else "chosen: all devices compute in FP8"
    return FP8Choice(scheme=scheme, skip=settings.patterns, reason=reason)


def convrot_group(width: int) -> int:
    """Returns how many of a layer's `width` inputs are rotated together: ComfyUI's 256, or else the larger of 64 and 16
    that divides `width`; 0 if none does."""
    return next((group for group in (256, 64, 16) if not width % group), 0)


def _lack(device: str) -> str:
    """Returns the reason why a device of the host cannot multiply in FP8; empty if it can."""
    if not device.startswith("cuda"):
        return "CPUs do not compute in FP8"
    if torch.version.hip is not None:
        return "FP8 products are for NVIDIA GPUs here"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return "compute capability {}.{}, but FP8 multiplication needs {}.{}".format(*capability, *CAPABILITY)
    return ""


def _refusal(scheme: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"scheme is {scheme!r}, which does not work on {problem}; allowed here are {allowed}")
