"""A host process that is killed in the middle of a step: `python -m tests.distributed.dying_host FOLDER`.

Prints the workers' process ids as JSON, then "busy" when steps are running.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from parallel.config import SequenceParallelConfig, resolve
from parallel.host.group import WorkerGroup
from tests.distributed.devices import on_ranks
from tests.distributed.tiny_models import Inputs, loaded, step


def main(folder: str) -> None:
    group = WorkerGroup(resolve(SequenceParallelConfig(devices=on_ranks("cpu,cpu"))), threads=1)
    group.start()
    print(json.dumps(group.pids), flush=True)
    with loaded(group, Path(folder)) as model:
        step(model, Inputs())
        threading.Timer(0.3, print, ["busy"], {"flush": True}).start()
        step(model, Inputs(frames=16, height=96, width=96))  # would take minutes


if __name__ == "__main__":
    main(sys.argv[1])
