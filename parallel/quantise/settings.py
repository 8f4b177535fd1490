"""What the FP8 node asks for, as data, and which scheme that means on the group's devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import Layout
from ..errors import ConfigError

NODE = "FP8 Quantize (SP)"
DYNAMIC = ("dynamic_rowwise", "dynamic_tensorwise")
"""Schemes that multiply in FP8: activations are rounded, too, with scales of the moment. The first is the better."""
TENSORWISE = DYNAMIC[1]
"""The only scheme with one scale for a whole weight; the others have one for each of its rows."""
WEIGHT_ONLY = "weight_only"
KITCHEN = {"int8_convrot": "int8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""Schemes that are comfy-kitchen's, as ComfyUI's quantised files have them → ComfyUI's name. Never chosen by `auto`."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCHEMES = ("auto", *DYNAMIC, WEIGHT_ONLY, *KITCHEN)
CAPABILITY = (8, 9)
"""CUDA compute capability from which GPUs multiply in FP8 (Ada; then Hopper and Blackwell)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Settings:
    """The node's inputs."""

    scheme: str = "auto"
    """`dynamic_rowwise` (a scale per token and per output channel), `dynamic_tensorwise` (one per tensor),
    `weight_only` (saves memory, computes as before), `auto`: the first of these that all devices can do; or one of
    `KITCHEN`, by ComfyUI's own layers: integers of 8 bits after a rotation, FP8 with a scale for 32 values, FP4 with
    one for 16. Devices that do not compute in the format restore the weights at each call."""
    skip: str = ""
    """Comma-separated patterns of layers to leave as they are, besides those that always stay; see
    `selection.matches`."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(f"scheme is {self.scheme!r}; allowed are {', '.join(SCHEMES)}")
        if not isinstance(self.skip, str):
            raise ConfigError(f"skip is {self.skip!r}; allowed is a text: comma-separated patterns of layer names")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of `skip`, without blanks."""
        return tuple(pattern for part in self.skip.split(",") if (pattern := part.strip()))


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Choice:
    """What all ranks do."""

    scheme: str
    """Not `auto`."""
    skip: tuple[str, ...]
    """`FP8Settings.patterns`."""
    reason: str = ""
    """Why this scheme, where `auto` has chosen it."""

    def to_json(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "skip": list(self.skip)}


@dataclass(kw_only=True, slots=True, frozen=True)
class FP8Report:
    """What became of a model, on each worker."""

    scheme: str
    reason: str
    layers: int
    """Linear layers whose weights have been quantised."""
    already: int
    """Layers that the file, or the loader, keeps in FP8, and that this scheme leaves so."""
    skipped: int
    """Layers left as they are because they always are, or by `skip`."""
    unfit: int
    """Layers left as they are because the scheme's products need sides of multiples of 16 or 32."""
    restored: int
    """Quantised layers whose weights are made anew at each call: the device does not compute in their format."""
    bytes_before: int
    """Of all weights on one worker without the node."""
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        counts = {
            "in FP8 already": self.already,
            "left as they are by the skip list": self.skipped,
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
    """Refuses before any work what the devices cannot do; what their kernels cannot, `choose_scheme` finds out.

    Raises:
        ConfigError: a dynamic scheme, and a device without FP8 arithmetic.
    """
    if settings.scheme not in DYNAMIC:
        return
    for device in layout.devices:
        if lack := _lack(device.name):
            raise _refusal(settings.scheme, f"{device.name}: {lack}", "auto or weight_only")


def likely_scheme(settings: FP8Settings, layout: Layout) -> str:
    """What `choose_scheme` will say, if the devices' kernels work."""
    if settings.scheme != "auto":
        return settings.scheme
    return WEIGHT_ONLY if any(_lack(device.name) for device in layout.devices) else DYNAMIC[0]


def choose_scheme(settings: FP8Settings, layout: Layout, found: Sequence[Mapping[str, str]]) -> FP8Choice:
    """One scheme for all ranks.

    Args:
        found: each rank's `support`: dynamic scheme → why it does not work there; empty where it does.

    Raises:
        ConfigError: the scheme asked for does not work on a device.
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
    """How many inputs of a layer are rotated together: ComfyUI's 256, or the most that divides them; 0 if none does."""
    return next((group for group in (256, 64, 16) if not width % group), 0)


def _lack(device: str) -> str:
    """Why a device of the host's cannot multiply in FP8; empty where it can."""
    if not device.startswith("cuda"):
        return "CPUs do not compute in FP8"
    if torch.version.hip is not None:
        return "FP8 products are for NVIDIA GPUs here"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return "compute capability {}.{}, FP8 products need {}.{}".format(*capability, *CAPABILITY)
    return ""


def _refusal(scheme: str, problem: str, allowed: str) -> ConfigError:
    return ConfigError(f"scheme is {scheme!r}, which does not work on {problem}; allowed here are {allowed}")
