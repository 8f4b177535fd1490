"""Work of Torch Compile (SP): attaches its settings to a MODEL and reports on each sampling that uses it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..parallel.comfyui import contract
from ..parallel.compilation.settings import CompileSettings
from ..parallel.errors import UnsupportedError
from ..parallel.host.compiled_sampling import CompiledSampling
from .cached_call import COMPILED
from .node_text import tell
from .refusals import refuse_loader
from .shell_patcher import SequenceParallelPatcher

log = logging.getLogger("sequence_parallel")

_ATTACHED = "sequence_parallel_compile"
"""Key of the settings in `transformer_options`."""


@dataclass(frozen=True, slots=True)
class _Attached:
    """Settings that the node has attached to a MODEL."""

    settings: CompileSettings
    node_id: str
    """Id of the node that shows the result."""


def with_compiled_blocks(model: Any, settings: CompileSettings, node_id: str) -> SequenceParallelPatcher:
    """Returns a clone of the MODEL whose samplings run compiled blocks. It shares the MODEL's weights and workers.

    Raises:
        UnsupportedError: the MODEL is from another loader, or has compiled blocks already.
    """
    contract.require("caches")
    if not isinstance(model, SequenceParallelPatcher):
        raise refuse_loader(settings.name, model, "Use TorchCompileModel for it")
    if _ATTACHED in model.model_options.get("transformer_options", {}):
        raise UnsupportedError(f"this MODEL has gone through {settings.name} already; remove one of the two nodes")
    compiled = model.clone()
    compiled.model_options.setdefault("transformer_options", {})[_ATTACHED] = _Attached(settings, node_id)
    compiled.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _ATTACHED, _sample)
    return compiled


def _sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps OUTER_SAMPLE: runs each sampling with compiled blocks and ends it with a report."""
    guider = executor.class_obj
    original = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(original)
    transformer_options = options["transformer_options"]
    attached: _Attached = transformer_options[_ATTACHED]
    sampling = transformer_options[COMPILED] = CompiledSampling(attached.settings)
    guider.model_options = options
    try:
        result = executor(*args, **kwargs)
    finally:
        guider.model_options = original
    if sampling.report.failures:
        log.warning("%s", sampling.report)
    tell(attached.node_id, str(sampling.report))
    return result
