"""The pack's settings in ComfyUI's settings dialog. They are read from ComfyUI's file at each use, so that they also
apply to prompts queued without a browser.

ComfyUI stores the settings per user, and a node does not know whose prompt it runs. So with `--multi-user` the defaults
apply.
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
    """The user's settings for the whole pack."""

    devices: str = "auto"
    """Devices of nodes without SP Config, in the format of its `devices`."""
    keep_alive_minutes: float = 0.0
    """Minutes after which idle workers exit; 0: never."""
    preview_interval_seconds: float = 0.0
    """Minimum seconds between two previews of Sampler (SP); 0: one at every step, as in KSampler."""
    replace_vae_decode: bool = False
    """True if the front end's Use all GPUs also replaces VAE Decode; in Python it is only reported."""
    log_level: str = "comfyui"
    """Key of LOG_LEVELS; `comfyui` uses the level of ComfyUI's own messages."""

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
"""Maps each field to its setting's id, as registered by `js/settings.js`."""

_read: tuple[tuple[int, int], Settings] | None = None
"""Modification time and size of the settings file, and the settings in it."""


def read() -> Settings:
    """Returns the current settings, and applies a changed log level.

    Raises:
        ConfigError: a setting has a value that is not allowed.
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
        return Settings()  # not written yet, or being written at this moment
    return _read[1]


def _parse(stored: Mapping[str, Any]) -> Settings:
    """Builds the settings; a value cleared in the dialog (null or an empty text) becomes the default."""
    values = {name: stored.get(key) for name, key in _IDS.items()}
    return Settings(**{name: value for name, value in values.items() if value is not None and value != ""})


def default_config() -> SequenceParallelConfig:
    """Returns the configuration of nodes without SP Config.

    Raises:
        ConfigError: a setting has a value that is not allowed.
    """
    return SequenceParallelConfig(devices=read().devices)


def default_devices(inputs: Mapping[str, Any]) -> str:
    """Returns the default devices, for `fingerprint_inputs` of a node with an optional `sp_config`; empty if connected.

    If the setting changes, so does the node's MODEL, though no input has changed.

    Args:
        inputs: the inputs that ComfyUI passes to `fingerprint_inputs`; a connected input has the value None.
    """
    if "sp_config" in inputs:  # then the setting is not used
        return ""
    try:
        return read().devices
    except ConfigError as error:  # `execute` raises it; raised here, ComfyUI would only log it
        return str(error)


def keep_alive_seconds() -> float:
    """Returns the idle time for `running.keep_alive`; 0, which keeps the workers, if a setting is not allowed."""
    try:
        return 60 * read().keep_alive_minutes
    except ConfigError as error:
        log.warning("%s", str(error))
        return 0.0
