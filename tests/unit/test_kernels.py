"""Attention kernels that are not PyTorch's own, against stand-ins with their packages' conventions."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallel.attention.kernels import Auto, Sage, Sdpa, select
from parallel.attention.merge import merge
from parallel.attention.ring import RingAttention
from parallel.errors import UnsupportedError

CPU = torch.device("cpu")


def sageattn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """As sageattention 2.2.0 (sageattention/core.py), computed exactly: its signature, what it refuses, and its
    log-sum-exp, for which it corrects base-2 numbers of scores without their mean key."""
    assert q.dtype in (torch.float16, torch.bfloat16), (
        "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    )
    assert q.dtype == k.dtype == v.dtype and tensor_layout == "HND" and not is_causal
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    if q.size(-1) > 128:
        raise ValueError(f"Unsupported head_dim: {q.size(-1)}")
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    mean = k.float().mean(dim=2, keepdim=True)
    scores = q.float() @ (k.float() - mean).mT * scale
    out = (scores.softmax(-1) @ v.float()).to(q.dtype)
    if not return_lse:
        return out
    base_2 = torch.logsumexp(scores, -1) * 1.44269504
    return out, base_2 / 1.44269504 + (q.float() @ mean.mT).squeeze(-1) * scale


def sageattn_1(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, **kwargs: Any
) -> Any:
    """As sageattention 1.0.6: there is no `return_lse`, and nothing says so."""
    return sageattn_2(q, k, v, tensor_layout, is_causal)


def sage(monkeypatch: pytest.MonkeyPatch, sageattn: Any) -> Sage:
    package: Any = ModuleType("sageattention")
    package.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", package)
    kernel = select("sage", CPU)
    assert isinstance(kernel, Sage)
    return kernel


def random(queries: int, keys: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v as they come out of an exchange: seen through strides. The keys have a mean, as in real models."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 3, dim).permute(1, 2, 0, 3) for n in (queries, keys, keys))
    return [part.to(dtype) for part in (q, k + 1, v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sage_alone_and_in_parts_of_a_ring(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Keys in uneven parts, none as long as the queries."""
    kernel = sage(monkeypatch, sageattn_2)
    q, k, v = random(7, 12, dtype=dtype)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (kernel(q, k, v).float() - exact).abs().max() < 0.02
    first, lse = kernel.with_lse(q, k[:, :, :5], v[:, :, :5])
    merged, total = merge(first.float(), lse, *kernel.with_lse(q, k[:, :, 5:], v[:, :, 5:]))
    assert (merged - exact).abs().max() < 0.02
    scores = q.float() @ k.float().mT / 8
    assert torch.allclose(total, torch.logsumexp(scores, -1), atol=1e-3)


def test_sage_1_works_but_for_a_ring(monkeypatch: pytest.MonkeyPatch):
    kernel = sage(monkeypatch, sageattn_1)
    q, k, v = random(4, 4)
    assert kernel(q, k, v).shape == q.shape
    with pytest.raises(
        UnsupportedError, match=r"cannot be used in a ring .*gives no log-sum-exp; install sageattention 2"
    ):
        RingAttention((4, 4), 0, None, kernel)  # type: ignore[arg-type]  # refused before the group is of use


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [(64, torch.float32, "this model has 64 in float32"), (256, torch.bfloat16, "this model has 256 in bfloat16")],
)
def test_sage_refuses_by_name_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype, message: str
):
    with pytest.raises(UnsupportedError, match=f"attention 'sage' computes in float16 and bfloat16.*{message}"):
        sage(monkeypatch, sageattn_2)(*random(4, 4, dim, dtype))


def test_sage_names_itself_when_its_package_refuses(monkeypatch: pytest.MonkeyPatch):
    def unknown_gpu(q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False, **kwargs: Any) -> Any:
        raise ValueError("Unsupported CUDA architecture: sm70")

    with pytest.raises(UnsupportedError, match=r"attention 'sage': .*sm70; use auto"):
        sage(monkeypatch, unknown_gpu)(*random(4, 4))


def test_auto_never_takes_an_8_bit_kernel(monkeypatch: pytest.MonkeyPatch):
    sage(monkeypatch, sageattn_2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for device in (CPU, torch.device("cuda:0")):
        assert isinstance(select("auto", device), Sdpa)


def auto_that_fails_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[Auto, list[int]]:
    """`Auto` as on a GPU of capability 9.0, whose first call raises; and a list that grows with each call of SDPA."""
    calls: list[int] = []

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return original(*tensors)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return Auto([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]), calls


@pytest.mark.parametrize(
    "text",
    [
        "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.",
        "cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.",
        "cuDNN Frontend error: No valid engine configs for Matmul_MUL_GEN_INDEX_GEN_INDEX_CMP_GE_",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    ],
)
def test_auto_goes_on_without_cudnn_where_it_promises_a_kernel_and_has_none(monkeypatch: pytest.MonkeyPatch, text: str):
    """PyTorch asks cuDNN beforehand, which may still find no plan."""
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    kernel, calls = auto_that_fails_once(monkeypatch, RuntimeError(text))
    for _ in range(2):
        torch.testing.assert_close(kernel(q, k, v), expected)
    assert len(calls) == 3, "cuDNN was asked again"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("cuDNN Frontend error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("Expected mha_graph->execute(handle, variant_pack, workspace_ptr.get()).is_good() to be true"),
        RuntimeError("NCCL error: unhandled cuda error, CUDNN_STATUS_NOT_INITIALIZED"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=str,
)
def test_auto_raises_any_other_error(monkeypatch: pytest.MonkeyPatch, error: Exception):
    kernel, calls = auto_that_fails_once(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        kernel(*torch.randn(3, 1, 2, 5, 8))
    assert caught.value is error
    assert len(calls) == 1


def test_a_failure_without_cudnn_is_raised(monkeypatch: pytest.MonkeyPatch):
    error = RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.")
    auto_that_fails_once(monkeypatch, error)
    with pytest.raises(RuntimeError, match="No execution plans"):
        Auto([SDPBackend.MATH])(*torch.randn(3, 1, 2, 5, 8))


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_kernels_of_half_precision_refuse_others_by_name(name: str):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    for call in (select(name, CPU), select(name, CPU).with_lse):
        with pytest.raises(UnsupportedError, match=f"attention '{name}' computes in float16 and bfloat16.*float32"):
            call(q, k, v)
