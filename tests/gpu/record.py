"""Writes each test's outcome to a file as soon as it is known: `pytest -p tests.gpu.record`.

One JSON object a line, so that what was known stays when the time is up. `SEQUENCE_PARALLEL_RECORD` is the file.
"""

from __future__ import annotations

import json
import os

import pytest

VARIABLE = "SEQUENCE_PARALLEL_RECORD"
_MOST = 2000
"""Characters kept of what a test prints or says."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:  # set-up and taking down are told when they fail or skip
        return
    entry = {
        "test": report.nodeid,
        "outcome": report.outcome if report.when == "call" or report.skipped else "error",
        "seconds": round(report.duration, 3),
        "printed": report.capstdout[-_MOST:],
        **{name: value for name, value in report.user_properties if name == "feature"},
    }
    if report.skipped and isinstance(report.longrepr, tuple):
        entry["why"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        entry["why"] = report.longreprtext[-_MOST:]
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(entry) + "\n")
