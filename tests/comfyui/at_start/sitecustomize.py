"""Runs at the start of each Python that has this folder in PYTHONPATH: the test server's, and its workers', which
detect a file by ComfyUI's own code, too. See `tiny_detection`."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

_DETECTION = "comfy.model_detection"
COMPUTES_IN_NVFP4 = "SEQUENCE_PARALLEL_TEST_COMPUTES_IN_NVFP4"
"""Set, ComfyUI quantises activations to nvfp4 on a CPU, too, as it does on newer GPUs."""


class _TinyDetection:
    """Waits in `sys.meta_path` until ComfyUI's detection is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _DETECTION:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)  # this may be a question only
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_apply(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _apply()

        spec.loader.exec_module = execute_and_apply  # type: ignore[method-assign]
        return spec


def _compute_in_nvfp4() -> None:
    import comfy.model_management
    import comfy_kitchen

    def without_kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError("there is none for CPUs")  # which comfy-kitchen answers by multiplying restored values

    comfy.model_management.supports_nvfp4_compute = lambda device=None: True
    comfy_kitchen.scaled_mm_nvfp4 = without_kernel


def _apply() -> None:
    if os.environ.get(COMPUTES_IN_NVFP4):
        _compute_in_nvfp4()
    file = Path(__file__).parent.parent / "test_pack" / "tiny_detection.py"
    spec = importlib.util.spec_from_file_location("sequence_parallel_tiny_detection", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.apply()


sys.meta_path.insert(0, _TinyDetection())
