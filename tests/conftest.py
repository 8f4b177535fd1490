"""Keeps pytest out of the root package, and ends every run with what was skipped and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.distributed import devices

LEFT_OUT = {
    "thousands": "make test ARGS='-m thousands'",
    "extended": "make test ARGS='-m extended'",
    "slow": "make slow",
}
"""Marker → what runs such tests, the longest-running ones first."""


class RootIsNoPackage:
    """The repository root has an `__init__.py`, for ComfyUI. pytest would import it before the first test."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_addoption(parser: pytest.Parser) -> None:
    titles = ", ".join(f"{name}: {kind.title}" for name, kind in devices.KINDS.items())
    parser.addoption(
        "--devices", choices=list(devices.KINDS), default="cpu", help=f"of the ranks in tests/distributed ({titles})"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Each worker and each ComfyUI would compile the sources again, which is a fifth of its start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    devices.choose(config.getoption("--devices"))
    config.pluginmanager.register(RootIsNoPackage())  # as a hook of this file it would only see what lies in tests/


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    yield  # pytest's own sections come first, its line of counts follows
    left_out = Counter(map(_left_out_by, terminalreporter.stats.get("deselected", [])))
    for mark, run in LEFT_OUT.items():
        if mark in left_out:
            terminalreporter.write_line(f"not in this run: {left_out[mark]} {mark} ones ({run})")
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        terminalreporter.write_line(f"skipped: {count} ({reason})")


def _left_out_by(item: pytest.Item) -> str:
    """The marker that has left a test out."""
    return next((mark for mark in LEFT_OUT if item.get_closest_marker(mark)), "")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    assert isinstance(report.longrepr, tuple)  # a skip carries (path, line, message)
    return report.longrepr[2].removeprefix("Skipped: ")
