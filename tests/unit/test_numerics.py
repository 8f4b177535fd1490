"""Workers compute with the host's switches of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import numerics

ROOT = Path(__file__).parents[2]
OF_ANOTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from parallel import numerics
numerics.apply(json.loads(sys.argv[2])) if sys.argv[2].startswith("{") else exec(sys.argv[2])
print(json.dumps(numerics.read()))
"""
OLD_KEYS = {"float32_matmul_precision", "cudnn_tf32"}


def of_another_process(switches: dict[str, Any] | str) -> dict[str, Any]:
    """The switches of a process that has applied some, or has run a statement."""
    text = switches if isinstance(switches, str) else json.dumps(switches)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OF_ANOTHER_PROCESS, str(ROOT), text],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(found.stdout)


@pytest.mark.slow
def test_another_process_takes_every_switch():
    before = numerics.read()
    wanted = {
        name: not value if isinstance(value, bool) else value
        for name, value in before.items()
        if not name.endswith("fp32_precision")
    }
    wanted |= {"deterministic": [True, True], "float32_matmul_precision": "high"}
    assert {**before, **wanted}.keys() == before.keys()
    found = of_another_process(wanted)
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "unreadable", "expected"),
    [
        (
            "torch.backends.cudnn.allow_tf32 = False; torch.set_float32_matmul_precision('high')",
            set(),
            {"cudnn_tf32": False, "float32_matmul_precision": "high", "cuda_matmul_fp32_precision": "tf32"},
        ),
        (
            "torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'",
            OLD_KEYS,
            {"cuda_matmul_fp32_precision": "tf32", "cudnn_conv_fp32_precision": "ieee"},
        ),
        (
            "torch.set_float32_matmul_precision('high'); torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
            {"cudnn_tf32"},
            {"cuda_matmul_fp32_precision": "tf32", "cudnn_rnn_fp32_precision": "ieee"},
        ),
    ],
    ids=["old", "new", "mixed"],
)
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch without fp32_precision")
def test_tf32_is_taken_over_by_whichever_interface_it_was_set(
    statement: str, unreadable: set[str], expected: dict[str, Any]
):
    """What torch refuses to read, since only the newer interface can say it, stays unsaid."""
    host = of_another_process(statement)
    assert OLD_KEYS - host.keys() == unreadable
    assert host.items() >= expected.items()
    assert of_another_process(host) == host


def test_a_switch_that_this_torch_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(numerics._SWITCHES, "of_tomorrow", "cudnn.of_tomorrow")
    monkeypatch.setitem(numerics._SWITCHES, "also_of_tomorrow", "cudnn.of_tomorrow.fp32_precision")
    assert not {"of_tomorrow", "also_of_tomorrow"} & numerics.read().keys()
