"""Compiled blocks in one process: settings, the folder, and each family's blocks as one graph."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.adapters import two_stream
from parallel.adapters.base import StepContext
from parallel.adapters.registry import FAMILIES
from parallel.attention.joint import JointAttention, Unexchanged
from parallel.attention.kernels import Sdpa
from parallel.compilation import compiler as compiler_module
from parallel.compilation.blocks import CompiledBlocks
from parallel.compilation.folder import VARIABLE, use_folder
from parallel.compilation.settings import MODES, CompileSettings
from parallel.degrees import Degrees
from parallel.demo.checkpoint import WRITERS
from parallel.errors import ConfigError
from parallel.host.compiled_sampling import CompiledSampling
from parallel.plan import SequencePlan
from parallel.worker.resident import ResidentModel

PLAIN = {"flux", "wan", "mochi"}
"""One of each kind; the others are in the extended set."""
TWO_STREAM = {"hunyuan_video", "flux", "flux2"}
"""Families with single-stream blocks, too."""
OPTIONS: dict[str, dict[str, Any]] = {
    "wan": {"context_dim": 64, "depth": 2},
    **{family: {"depth": 2, "depth_single": 2} for family in TWO_STREAM},
}

_torch_compile = torch.compile


# --- settings and folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "reduce-overhead"}, "mode is 'reduce-overhead'; allowed are default, max-autotune-no-cudagraphs"),
        ({"dynamic": 1}, "dynamic is 1; allowed are True and False"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CompileSettings(**settings)


@pytest.mark.parametrize("mode", MODES)
def test_settings_survive_json_and_are_known_to_the_compiler(mode: str):
    settings = CompileSettings(mode=mode, dynamic=False)
    assert CompileSettings(**json.loads(json.dumps(settings.to_json()))) == settings
    assert not any("cudagraph" in name for name in torch._inductor.list_mode_options(mode))


def test_the_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = use_folder()
    assert folder.is_relative_to(tmp_path) and folder.stat().st_mode & 0o777 == 0o700
    assert os.environ[VARIABLE] == str(folder)
    monkeypatch.delenv(VARIABLE)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=f"others can write to {folder}; set {VARIABLE}"):
        use_folder()
    folder.chmod(0o700)
    monkeypatch.setenv(VARIABLE, f"{tempfile.gettempdir()}/torchinductor_somebody")  # as PyTorch itself sets it
    assert use_folder() == folder
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert use_folder() == tmp_path / "mine"


# --- blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Traces and guards as ever, but generates no code, which takes most of the time."""

    def trace(function: Callable[..., Any], *, fullgraph: bool, dynamic: bool, options: dict[str, Any]) -> Any:
        return _torch_compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "compiled"))
    torch.compiler.reset()


class Part(StepContext):
    """One rank of several, which attends to its own tokens only."""

    def __init__(self, rank: int, world: int, compiler: CompiledBlocks | None = None):
        self.rank, self._world, self.compiler = rank, world, compiler

    def plan(self, streams: tuple[int, ...], heads: int) -> SequencePlan:
        return SequencePlan(streams, heads, (1.0,) * self._world)

    def attention(self, plan: SequencePlan) -> JointAttention:
        return Unexchanged(Sdpa())

    def enter_block(self, plan: SequencePlan) -> None:
        pass


def step(model: ResidentModel, size: int, context: StepContext) -> Tensor:
    """The part of this rank; zeros elsewhere."""
    inputs = model.adapter.example(model.config, size, torch.float32)
    x, timestep = inputs.pop("x"), inputs.pop("timestep")
    out = torch.zeros(model.adapter.output_shape(model.config, tuple(x.shape)))
    with torch.no_grad():
        model.adapter.step(model.model, x, timestep, model.adapter.prepare(inputs), out, context)
    return out


def tiny(family: str, folder: Path, **options: Any) -> ResidentModel:
    path = folder / "model.safetensors"
    WRITERS[family](path, **OPTIONS.get(family, {"depth": 2}), **options)
    recipe = {"path": str(path), "weight_dtype": "float32", "compute_dtype": "float32"}
    return ResidentModel(recipe, torch.device("cpu"), lambda done, total: None)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in PLAIN else pytest.mark.extended) for name in FAMILIES]
)
def test_blocks_are_one_graph_for_all_sizes_and_all_ranks(quick: None, tmp_path: Path, family: str):
    """Of four ranks the first owns no text, and of a small latent the last owns nothing else."""
    model = tiny(family, tmp_path)
    blocks = CompiledBlocks(CompileSettings(), lambda: None)
    for rank, world, size in ((0, 1, 4), (0, 1, 7), (0, 4, 16), (3, 4, 16), (0, 4, 18)):
        expected = step(model, size, Part(rank, world))
        assert torch.equal(step(model, size, Part(rank, world, blocks)), expected)
    tally = blocks.take_tally()
    assert tally.failure == "" and tally.breaks == 0
    assert tally.kinds == (2 if family in TWO_STREAM or family == "mochi" else 1)
    assert tally.kinds <= tally.graphs <= 3 * tally.kinds, "with both, without text, or with nothing else"


def test_scaled_fp8_layers_share_a_graph_for_all_their_scales(quick: None, tmp_path: Path):
    model = tiny("hunyuan_video", tmp_path, scaled="comfy_quant")
    blocks = CompiledBlocks(CompileSettings(), lambda: None)
    assert torch.equal(step(model, 4, Part(0, 1, blocks)), step(model, 4, Part(0, 1)))
    tally = blocks.take_tally()
    assert (tally.failure, tally.graphs) == ("", 2)


def test_a_block_that_cannot_be_compiled_runs_as_it_is(quick: None):
    def block(x: Tensor) -> Tensor:
        print("Python that the compiler cannot take into a graph", file=open(os.devnull, "w"))  # noqa: SIM115
        return x + 1

    blocks = CompiledBlocks(CompileSettings(), lambda: None)
    assert torch.equal(blocks(block)(torch.zeros(2)), torch.ones(2))
    tally = blocks.take_tally()
    assert tally.failure and tally.kinds == 1
    assert blocks(two_stream.head) is two_stream.head, "nothing is tried any more"


@pytest.mark.parametrize(("factor", "trusted"), [(1.0, True), (1.01, False), (float("nan"), False)])
def test_compiled_blocks_that_disagree_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, trusted: bool
):
    def compiler(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments) * factor

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    model = tiny("wan", tmp_path)
    blocks = CompiledBlocks(CompileSettings(), lambda: None)
    with torch.no_grad():
        model.check_compiled(blocks, Part(0, 1), Part(0, 1), Degrees())
    assert (blocks.failure == "") == trusted
    if not trusted:
        assert "compiled, a small step differs by" in blocks.failure
        assert torch.equal(step(model, 4, Part(0, 1, blocks)), step(model, 4, Part(0, 1)))


def test_a_failure_inside_an_attention_is_not_covered_up(quick: None):
    """The other ranks are in it: running the block again would leave them waiting."""

    class Broken(Unexchanged):
        def start(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            raise RuntimeError("a peer is gone")

    blocks = CompiledBlocks(CompileSettings(), lambda: None)
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="a peer is gone"):
        blocks(_attend)(q, Broken(Sdpa()))
    assert not blocks.failure
    assert torch.equal(blocks(_attend)(q, Unexchanged(Sdpa())), q + 1), "and nothing is left of it"


def _attend(q: Tensor, attend: JointAttention) -> Tensor:
    return attend(q, q, q) + 1


def test_signs_of_life_during_a_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(compiler_module, "_SIGN_S", 0.01)
    signs: list[int] = []

    def slow_backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        torch.randn(600, 600).inverse()
        while len(signs) < 5:
            torch.randn(100, 100).inverse()
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, **_: _torch_compile(function, backend=slow_backend))
    blocks = CompiledBlocks(CompileSettings(), lambda: signs.append(1))
    blocks(_plus_one)(torch.zeros(3))
    assert len(signs) >= 5
    count = len(signs)
    blocks(_plus_one)(torch.zeros(3))
    assert len(signs) <= count + 1 and blocks.take_tally().seconds > 0


def _plus_one(x: Tensor) -> Tensor:
    return x + 1


# --- what is told -------------------------------------------------------------------------------------------------


def told(**changes: Any) -> dict[str, Any]:
    plain = {"seconds": 0.0, "graphs": 0, "breaks": 0, "recompilations": 0, "kinds": 2, "failure": ""}
    return {"compile": plain | changes}


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (
            [
                [told(seconds=2.0, graphs=2), told(seconds=3.0, graphs=2)],
                [told(), told(seconds=1.5, graphs=1, recompilations=1)],
            ],
            "2 kinds of blocks, 3 graphs compiled in 4.5 s (slowest worker); 0 graph breaks, 1 recompilation",
        ),
        ([[told(), told()]], "2 kinds of blocks, compiled before"),
        (
            [[told(), told(failure="InvalidCxxCompiler: none")]],
            "WARNING: not compiled on worker rank 1: InvalidCxxCompiler: none",
        ),
        ([], "no step has run"),
        ([[told(kinds=0)]], "WARNING: not compiled: this family's blocks cannot be compiled yet"),
    ],
)  # fmt: skip
def test_the_report_names_ranks_and_causes(steps: list[list[dict[str, Any]]], text: str):
    sampling = CompiledSampling(CompileSettings())
    for results in steps:
        sampling.count(results)
    assert str(sampling.report) == f"Torch Compile (SP): {text}"
