"""The two inputs that say in which part of the sampling a node works."""

from __future__ import annotations

from comfy_api.latest import io


def start_percent(default: float) -> io.Input:
    return _part("start_percent", default, "before which every step is computed (0 to 1; 0: from the first step).")


def end_percent(default: float) -> io.Input:
    return _part("end_percent", default, "after which every step is computed (0 to 1; 1: to the last step).")


def _part(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, tooltip=f"Part of the sampling {tooltip}", advanced=True
    )
