"""Compiled blocks where there can be none: diffusers' classes run as they are, and the report says so.

Compiled blocks of ComfyUI's classes are tested in `tests/comfyui`.
"""

from __future__ import annotations

import pytest
import torch

from parallel.compilation.settings import CompileSettings
from parallel.host.compiled_sampling import CompiledSampling
from tests.distributed.tiny_models import HUNYUAN, NETWORKS, Inputs, StartGroup, TinyModels, loaded


@pytest.mark.parametrize(
    "network", [pytest.param(each, marks=[] if each == HUNYUAN else pytest.mark.extended) for each in NETWORKS]
)
def test_a_network_of_diffusers_runs_uncompiled_and_says_so(
    start_group: StartGroup, tiny_models: TinyModels, network: str
):
    request, compiled = Inputs(network).make(), CompiledSampling(CompileSettings())
    with loaded(start_group("cpu,cpu"), tiny_models.path(network)) as remote:
        (expected,) = remote.steps([request])
        (actual,) = remote.steps([request], compiled=compiled)
    assert torch.equal(actual, expected)
    report = compiled.report
    assert (report.steps, report.kinds, report.graphs, report.failures) == (1, 0, 0, ())
    assert str(report).endswith("WARNING: not compiled: the blocks of this network cannot be compiled")
