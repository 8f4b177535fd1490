"""Weights that pass through a GPU: the result of resident ones, in a third of the memory and about the time."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.gpu_offload import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_hunyuan_video_at_480p():
    found = measure(toy=False)
    print(found)
    assert found["same"]
    assert found["resident"] <= 0.35
    assert found["time"] <= 1.15
