"""Report for a question or a bug, for the panel: see `parallel.report`."""

from __future__ import annotations

import dataclasses

import comfyui_version

from ..parallel.errors import ConfigError
from ..parallel.host import group_log, running
from ..parallel.report import compose
from . import settings


def report() -> str:
    """Returns the report as Markdown. Runs nvidia-smi, so it may take seconds."""
    try:
        stored: object = dataclasses.asdict(settings.read())
    except ConfigError as error:
        stored = str(error)
    folder = group_log.folder()
    return compose(
        front={"ComfyUI": comfyui_version.__version__},
        config=stored,
        state=running.snapshot(),
        log_folders=[] if folder is None else [folder],
    )
