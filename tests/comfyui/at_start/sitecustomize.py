"""Runs at the start of each Python that has this folder in PYTHONPATH: the test server's, and its workers', which
detect a file by ComfyUI's own code, too. See `tiny_detection`."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_DETECTION = "comfy.model_detection"


class _TinyDetection:
    """Waits in `sys.meta_path` until ComfyUI's detection is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _DETECTION:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_apply(module: Any) -> None:
            execute(module)
            _apply()

        spec.loader.exec_module = execute_and_apply  # type: ignore[method-assign]
        return spec


def _apply() -> None:
    file = Path(__file__).parent.parent / "test_pack" / "tiny_detection.py"
    spec = importlib.util.spec_from_file_location("sequence_parallel_tiny_detection", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.apply()


sys.meta_path.insert(0, _TinyDetection())
