"""Workers compute with the host's switches of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import numerics

ROOT = Path(__file__).parents[2]
OF_ANOTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from parallel import numerics
numerics.apply(json.loads(sys.argv[2]))
print(json.dumps(numerics.read()))
"""


def test_another_process_takes_every_switch():
    before = numerics.read()
    wanted = {name: not value for name, value in before.items() if isinstance(value, bool)}
    wanted |= {"deterministic": [True, True], "float32_matmul_precision": "high"}
    assert wanted.keys() == before.keys()
    found = subprocess.run(
        [sys.executable, "-c", OF_ANOTHER_PROCESS, str(ROOT), json.dumps(wanted)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(found.stdout) == wanted


def test_a_switch_that_this_torch_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(numerics._SWITCHES, "of_tomorrow", (torch.backends.cudnn, "of_tomorrow"))
    assert "of_tomorrow" not in numerics.read()
