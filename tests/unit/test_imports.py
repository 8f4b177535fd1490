"""Imports that would cost every worker a second."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from parallel.adapters.registry import FAMILIES
from parallel.worker.imports import without_transformers
with without_transformers():
    for family in FAMILIES.values():
        family().model_class()
print("diffusers" in sys.modules, "transformers" in sys.modules)
import transformers
"""


def test_diffusers_models_come_without_transformers_which_stays_importable():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
