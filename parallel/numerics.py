"""Switches of torch by which the same code computes other bits, or at another speed.

Workers are set as their host is, so that ComfyUI's command line (`--fast`, `--deterministic`) and other packs' settings
hold for them, too, from the start.

TF32 has two interfaces since torch 2.9 (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32"):
`allow_tf32` and `set_float32_matmul_precision` on one hand, `fp32_precision` on the other, which inherits (operator →
backend → all) and can say what the older ones cannot. Reading an older one then raises RuntimeError; setting one sets
the newer one, too. So all are read, the older ones where they still answer, and the newer ones are set last.

What torch reads from the environment (`CUBLAS_WORKSPACE_CONFIG`, `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, …) they inherit.
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
"""Where below `torch.backends` each is, in the order in which they are set: of precisions from the general to the
special. `mkldnn.fp32_precision` itself is left out: assigning it sets the general one (torch 2.13), and its operators'
values say the same."""


def read() -> dict[str, Any]:
    """This process's switches, as plain data; those that this torch does not have are left out."""
    found: dict[str, Any] = {
        "deterministic": _deterministic(),
        "reduction_math_sdp": torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    }
    with suppress(RuntimeError):  # the newer interface says what this one cannot
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    for name, path in _SWITCHES.items():
        with suppress(AttributeError, RuntimeError):
            found[name] = attrgetter(path)(torch.backends)
    return found


def apply(switches: Mapping[str, Any]) -> None:
    """Sets this process as `read` found another one of the same torch."""
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
    """Whether only deterministic algorithms are allowed, and whether others merely warn."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]
