"""Torch's switches that change the bits of the same code's results, or its speed.

Workers copy the switches of their host, so that ComfyUI's command line (`--fast`, `--deterministic`) and other packs'
settings also apply to them, from the start.

TF32 has two interfaces since torch 2.9 (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32"):
the older `allow_tf32` and `set_float32_matmul_precision`, and the newer `fp32_precision`, which inherits (operator →
backend → all) and has states that the older one cannot express. In such a state reading the older one raises
RuntimeError; setting it also sets the newer one. So `read` reads both, skipping what raises, and `apply` sets the newer
one last.

Workers inherit the variables that torch reads (`CUBLAS_WORKSPACE_CONFIG`, `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, …).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any

import torch

_SWITCHES = {
    "fp16_accumulation": "cuda.matmul.allow_fp16_accumulation",
    "fp16_reduced_precision_reduction": "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "bf16_reduced_precision_reduction": "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn": "cudnn.enabled",
    "cudnn_benchmark": "cudnn.benchmark",
    "cudnn_deterministic": "cudnn.deterministic",
    "cudnn_tf32": "cudnn.allow_tf32",
    "fp32_precision": "fp32_precision",
    "cudnn_fp32_precision": "cudnn.fp32_precision",
    "cudnn_conv_fp32_precision": "cudnn.conv.fp32_precision",
    "cudnn_rnn_fp32_precision": "cudnn.rnn.fp32_precision",
    "cuda_matmul_fp32_precision": "cuda.matmul.fp32_precision",
    "mkldnn_conv_fp32_precision": "mkldnn.conv.fp32_precision",
    "mkldnn_rnn_fp32_precision": "mkldnn.rnn.fp32_precision",
    "mkldnn_matmul_fp32_precision": "mkldnn.matmul.fp32_precision",
}
"""Maps each switch to its path below `torch.backends`, in the order in which they are set: precisions from general to
specific. `mkldnn.fp32_precision` itself is left out: assigning it sets the general one (torch 2.13), and its operators'
values contain the same."""


def read() -> dict[str, Any]:
    """Returns this process's switches as plain data; those that this torch does not have are left out."""
    found: dict[str, Any] = {
        "deterministic": _deterministic(),
        "reduction_math_sdp": torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    }
    with suppress(RuntimeError):  # the newer interface has a state that this one cannot express
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    for name, path in _SWITCHES.items():
        with suppress(AttributeError, RuntimeError):
            found[name] = attrgetter(path)(torch.backends)
    return found


def apply(switches: Mapping[str, Any]) -> None:
    """Sets this process's switches to those that `read` returned in another process with the same torch."""
    if switches["deterministic"] != _deterministic():  # setting it imports torch's compiler, for 1.5 s of CPU time
        on, warn_only = switches["deterministic"]
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(switches["reduction_math_sdp"])
    if (precision := switches.get("float32_matmul_precision")) is not None:
        torch.set_float32_matmul_precision(precision)
    for name, path in _SWITCHES.items():
        if name in switches:
            owner, _, attribute = f"backends.{path}".rpartition(".")
            setattr(attrgetter(owner)(torch), attribute, switches[name])


def _deterministic() -> list[bool]:
    """Returns two flags: only deterministic algorithms are allowed; others merely warn."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]
