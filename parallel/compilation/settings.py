"""The user's settings for the compiler."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..errors import ConfigError

MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of `torch.compile` without CUDA graphs. A CUDA graph replays launches into memory of its own: it cannot include
a step's work between the launches (exchanges, Cancel), and would overwrite hidden states that a cache keeps."""


@dataclass(kw_only=True, slots=True, frozen=True)
class CompileSettings:
    """Settings of the Torch Compile (SP) node."""

    name: ClassVar[str] = "Torch Compile (SP)"
    """Name of the node in messages."""
    mode: str = "default"
    """`torch.compile` mode: `default` or `max-autotune-no-cudagraphs`, which tries more kernels and takes minutes."""
    dynamic: bool = True
    """True compiles once for all sizes and prompt lengths; False compiles again for each."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"mode is {self.mode!r}; allowed are {', '.join(MODES)} (modes with CUDA graphs cannot hold the"
                " exchanges between the devices)"
            )
        if not isinstance(self.dynamic, bool):
            raise ConfigError(f"dynamic is {self.dynamic!r}; allowed are True and False")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
