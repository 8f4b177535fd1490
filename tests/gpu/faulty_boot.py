"""A worker that fails when told to; stands in for `worker/boot.py` (`host.process._BOOT`).

Before each block but the first, a rank looks for a file of its number in the folder `SEQUENCE_PARALLEL_FAULTS`, which
names a fault. It removes the file, and the fault happens there, in the middle of a step.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

VARIABLE = "SEQUENCE_PARALLEL_FAULTS"
ILLEGAL_ACCESS, OUT_OF_MEMORY = "illegal access", "out of memory"
_BOOT = Path(__file__).parents[2] / "parallel" / "worker" / "boot.py"


def order(folder: Path, fault: str, *ranks: int) -> None:
    """Has these ranks fail in their next step."""
    for rank in ranks:
        (folder / f"{rank}.new").write_text(fault)
        (folder / f"{rank}.new").rename(folder / str(rank))


def happen(fault: str, device: str) -> None:
    """Raises what PyTorch raises for this fault."""
    import torch

    if fault == OUT_OF_MEMORY:
        torch.empty(2**50, dtype=torch.uint8, device=device)
        raise AssertionError("there was room for 1 PiB")
    assert fault == ILLEGAL_ACCESS and device.startswith("cuda")
    near = torch.zeros(1, device=device)
    # PyTorch takes the size that such an object states. Half of it on is an address that nobody has mapped.
    interface = {"shape": (2**40,), "typestr": "<f4", "data": (near.data_ptr(), False), "version": 3}
    far = torch.as_tensor(type("Far", (), {"__cuda_array_interface__": interface})(), device=device)
    far[2**39 : 2**39 + 1024].add(1)
    torch.cuda.synchronize(device)
    raise AssertionError("the access was legal")


def _install(ranks: Any, rank: int, device: str) -> None:
    """Adds the look to `ParallelContext.enter_block` of the engine's module `worker.ranks`."""
    file, enter_block = Path(os.environ[VARIABLE]) / str(rank), ranks.ParallelContext.enter_block

    def enter(self: Any, *pace: Any) -> None:
        enter_block(self, *pace)
        if self._block > 1 and file.exists():
            fault = file.read_text()
            file.unlink()
            happen(fault, device)

    ranks.ParallelContext.enter_block = enter


if __name__ == "__main__":
    entered = time.monotonic()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    boot, settings = runpy.run_path(str(_BOOT)), json.loads(sys.argv[1])
    boot["import_engine"]()
    _install(import_module(f"{boot['ENGINE']}.worker.ranks"), settings["rank"], settings["device"])
    import_module(f"{boot['ENGINE']}.worker.loop").main(settings, entered)
