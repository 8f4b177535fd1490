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
from typing import Any

import torch

_matmul, _cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
_SWITCHES: dict[str, tuple[Any, str]] = {
    "fp16_accumulation": (_matmul, "allow_fp16_accumulation"),
    "fp16_reduced_precision_reduction": (_matmul, "allow_fp16_reduced_precision_reduction"),
    "bf16_reduced_precision_reduction": (_matmul, "allow_bf16_reduced_precision_reduction"),
    "cudnn": (_cudnn, "enabled"),
    "cudnn_benchmark": (_cudnn, "benchmark"),
    "cudnn_deterministic": (_cudnn, "deterministic"),
    "cudnn_tf32": (_cudnn, "allow_tf32"),
}
_FP32_PRECISION: dict[str, tuple[str, ...]] = {
    "fp32_precision": (),
    "cudnn_fp32_precision": ("cudnn",),
    "cudnn_conv_fp32_precision": ("cudnn", "conv"),
    "cudnn_rnn_fp32_precision": ("cudnn", "rnn"),
    "cuda_matmul_fp32_precision": ("cuda", "matmul"),
    "mkldnn_conv_fp32_precision": ("mkldnn", "conv"),
    "mkldnn_rnn_fp32_precision": ("mkldnn", "rnn"),
    "mkldnn_matmul_fp32_precision": ("mkldnn", "matmul"),
}
"""Where below `torch.backends` each is, from the general to the special. `mkldnn.fp32_precision` itself is left out:
assigning it sets the general one (torch 2.13), and its operators' values say the same."""


def read() -> dict[str, Any]:
    """This process's switches, as plain data; those that this torch does not have are left out."""
    found: dict[str, Any] = {
        "deterministic": _deterministic(),
        "reduction_math_sdp": torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    }
    with suppress(RuntimeError):  # the newer interface says what this one cannot
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    for name, (owner, attribute) in _SWITCHES.items():
        with suppress(AttributeError, RuntimeError):
            found[name] = getattr(owner, attribute)
    for name, path in _FP32_PRECISION.items():
        with suppress(AttributeError):
            found[name] = _below_backends(path).fp32_precision
    return found


def apply(switches: Mapping[str, Any]) -> None:
    """Sets this process as `read` found another one of the same torch."""
    if switches["deterministic"] != _deterministic():  # setting it imports torch's compiler, for 1.5 s of CPU time
        on, warn_only = switches["deterministic"]
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(switches["reduction_math_sdp"])
    if (precision := switches.get("float32_matmul_precision")) is not None:
        torch.set_float32_matmul_precision(precision)
    for name, (owner, attribute) in _SWITCHES.items():
        if name in switches:
            setattr(owner, attribute, switches[name])
    for name, path in _FP32_PRECISION.items():
        if name in switches:
            _below_backends(path).fp32_precision = switches[name]


def _deterministic() -> list[bool]:
    """Whether only deterministic algorithms are allowed, and whether others merely warn."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]


def _below_backends(path: tuple[str, ...]) -> Any:
    owner: Any = torch.backends
    for name in path:
        owner = getattr(owner, name)
    return owner
