"""Entry script of a worker process, started by its path: `python boot.py '{"fd": 3, "rank": 0, …}'`.

It is started by path because `multiprocessing` would run the host's main script again, and because a custom node pack
has no importable name. The engine is imported under a private name, so nothing of this pack lands on `sys.path`, where
its `nodes` folder would hide ComfyUI's `nodes.py`.
"""

import time

ENTERED = time.monotonic()

import gc  # noqa: E402 (after the clock is read)

gc.disable()  # until all imports are done: they leave almost no garbage, and collecting takes a tenth of their time

import importlib.util  # noqa: E402 (after the clock is read)
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

ENGINE = "sequence_parallel_engine"


def import_engine() -> None:
    """Makes `parallel/` importable as `sequence_parallel_engine`."""
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(ENGINE, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[ENGINE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    # Python put this file's folder first, where its neighbours could hide other modules.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    import_engine()
    from importlib import import_module

    settings = json.loads(sys.argv[1])
    if settings["source"] != import_module(f"{ENGINE}.wire.source_files").AT_IMPORT:
        sys.exit("the files of this pack have changed since ComfyUI was started, by an update perhaps: restart ComfyUI")
    import_module(f"{ENGINE}.worker.loop").main(settings, ENTERED)
