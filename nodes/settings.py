"""The pack's settings in ComfyUI's settings dialog, as they are stored: read when they are needed, so that prompts that
come without a browser heed them, too.

ComfyUI keeps the settings of each user apart, and a node does not learn whose prompt it runs. So with `--multi-user`
the defaults hold.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ..parallel.config import SequenceParallelConfig, parse_devices
from ..parallel.errors import ConfigError

log = logging.getLogger("sequence_parallel")

LOG_LEVELS = {
    "comfyui": logging.NOTSET,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Settings:
    """What a user has set for the whole pack."""

    devices: str = "auto"
    """For nodes without SP Config, as its `devices`."""
    keep_alive_minutes: float = 0.0
    """Idle workers leave after so many minutes; 0: they stay."""
    preview_interval_seconds: float = 0.0
    """Least time between two previews of Sampler (SP); 0: one at every step, as KSampler shows them."""
    replace_vae_decode: bool = False
    """Whether the front end's Use all GPUs replaces VAE Decode, too; here it is only for the report."""
    log_level: str = "comfyui"
    """A key of LOG_LEVELS; `comfyui` is as ComfyUI's own messages."""

    def __post_init__(self) -> None:
        try:
            parse_devices(self.devices)
        except ConfigError as error:
            raise ConfigError(f"setting Sequence Parallel, Default devices: {error}") from error
        times = (
            ("Keep-alive", self.keep_alive_minutes, "minutes"),
            ("Preview interval", self.preview_interval_seconds, "seconds"),
        )
        for name, time, unit in times:
            if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < math.inf:
                raise ConfigError(f"setting Sequence Parallel, {name} is {time!r}; allowed are 0 or more {unit}")
        if not isinstance(self.replace_vae_decode, bool):
            raise ConfigError(
                f"setting Sequence Parallel, Use all GPUs: VAE Decode, too is {self.replace_vae_decode!r}; allowed are"
                " true and false"
            )
        if self.log_level not in LOG_LEVELS:
            allowed = ", ".join(LOG_LEVELS)
            raise ConfigError(f"setting Sequence Parallel, Log level is {self.log_level!r}; allowed are {allowed}")


_IDS = {
    "devices": "SequenceParallel.Workers.Devices",
    "keep_alive_minutes": "SequenceParallel.Workers.KeepAliveMinutes",
    "preview_interval_seconds": "SequenceParallel.Sampler.PreviewIntervalSeconds",
    "replace_vae_decode": "SequenceParallel.Workflow.ReplaceVAEDecode",
    "log_level": "SequenceParallel.Log.Level",
}
"""As `js/settings.js` registers them."""

_read: tuple[tuple[int, int], Settings] | None = None
"""The file's time and size, and what it says."""


def read() -> Settings:
    """The settings as of now; a changed log level takes effect.

    Raises:
        ConfigError: a value that is not allowed.
    """
    global _read
    if args.multi_user:
        return Settings()
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        found = path.stat()
        version = (found.st_mtime_ns, found.st_size)
        if _read is None or _read[0] != version:
            _read = version, _parse(json.loads(path.read_text(encoding="utf-8")))
            log.setLevel(LOG_LEVELS[_read[1].log_level])
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        return Settings()  # not written yet, or this very moment
    return _read[1]


def _parse(stored: Mapping[str, Any]) -> Settings:
    """A value that was cleared in the dialog (null, or an empty text) is the default."""
    values = {name: stored.get(key) for name, key in _IDS.items()}
    return Settings(**{name: value for name, value in values.items() if value is not None and value != ""})


def default_config() -> SequenceParallelConfig:
    """What holds for a node without SP Config.

    Raises:
        ConfigError: a value that is not allowed.
    """
    return SequenceParallelConfig(devices=read().devices)


def default_devices(inputs: Mapping[str, Any]) -> str:
    """What `fingerprint_inputs` of a node with an optional `sp_config` returns: another setting of the default devices
    makes another MODEL, though no input has changed.

    Args:
        inputs: as ComfyUI gives them there; of an input that is connected the value is None.
    """
    if "sp_config" in inputs:  # so the setting does not count
        return ""
    try:
        return read().devices
    except ConfigError as error:  # `execute` raises it; raised here, ComfyUI would only log it
        return str(error)


def keep_alive_seconds() -> float:
    """For `running.keep_alive`; a value that is not allowed keeps the workers."""
    try:
        return 60 * read().keep_alive_minutes
    except ConfigError as error:
        log.warning("%s", str(error))
        return 0.0
