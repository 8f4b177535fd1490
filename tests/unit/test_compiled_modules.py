"""Compiled blocks of a split network in one process; comfyui/test_compiled_networks.py has ComfyUI's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.compilation import compiler as compiler_module
from parallel.compilation import modules as modules_module
from parallel.compilation.folder import VARIABLE
from parallel.compilation.modules import CompiledModules
from parallel.compilation.settings import CompileSettings
from parallel.split import PlanError, SequenceRanks, Site, Split
from parallel.split.rules import Tokens

V = ("video",)
_torch_compile = torch.compile


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **named: Any) -> Tensor:
    """As ComfyUI's: looks for an override, and computes otherwise."""
    override = named["transformer_options"].get("optimized_attention_override")
    if override is not None:
        return override(_computed, q, k, v, heads, mask=mask, **named)
    return _computed(q, k, v, heads, mask, **named)


def _computed(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, skip_reshape: bool = False, **named: Any
) -> Tensor:
    if "broken" in named["transformer_options"]:
        raise RuntimeError("a peer is gone")
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
    return out if named.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        if transformer_options.get("skip_attention"):
            return x
        return attention(*self.qkv(x).chunk(3, -1), 2, transformer_options=transformer_options)


class Block(nn.Module):
    """Works in place, and reads options, as ComfyUI's blocks do."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = Attention(width)
        self.cross = Attention(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, vec: tuple[Tensor, Tensor], transformer_options: dict[str, Any]) -> Tensor:
        extra = transformer_options.copy()
        x += vec[0] * self.attn(x, transformer_options) + self.cross(vec[1], transformer_options).mean(1, keepdim=True)
        x += torch.nn.functional.gelu(self.mlp(x))
        return x * 2 if extra.get("doubled") else x


class Model(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        x, context = x.clone(), torch.ones(1, 5, x.shape[-1]) * t
        for number, block in enumerate(self.blocks):
            transformer_options["block_index"] = number
            vec = (t.sin(), context)
            if number:
                x = block(x, vec, transformer_options=transformer_options)
            else:  # in order, as some models do
                x = block(x, vec, transformer_options)
        return x


PLAN = {"blocks": Site(cut={"x": Tokens(V)}, whole="vec", attention={"attn": (V, V)})}


class Deaf(SequenceRanks):
    """A rank whose attention sees its own keys only."""

    def attention(self, plan: Any) -> Any:
        return lambda q, k, v, compute, mask: compute(q, k, v)


def compile_by(backend: Any) -> Callable[..., Any]:
    def by(function: Callable[..., Any], **named: Any) -> Any:
        return _torch_compile(function, **{**named, "options": None}, backend=backend)

    return by


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Traces and guards as ever, but generates no code, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", compile_by("eager"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "compiled"))
    torch.compiler.reset()


@pytest.fixture
def network() -> Model:
    return Model().requires_grad_(False)


def compiler() -> CompiledModules:
    return CompiledModules(CompileSettings(), lambda: None, torch.device("cpu"))


def run(network: Model, *, size: int = 9, step: int = 0, **options: Any) -> Tensor:
    x = torch.randn(1, size, 16, generator=torch.Generator().manual_seed(size))
    return network(x, torch.full((1, 1, 1), 1.0 + step), {"sigmas": torch.tensor([step]), **options})


def both(network: Model, blocks: CompiledModules, split: Split, **inputs: Any) -> None:
    expected = run(network, **inputs)
    with blocks.on(split.blocks):
        assert torch.equal(run(network, **inputs), expected)


def test_all_blocks_and_steps_and_sizes_share_a_graph(network: Model):
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = compiler()
    for step in range(4):
        both(network, blocks, split, step=step)
    both(network, blocks, split, size=14)
    tally = blocks.take_tally()
    assert (tally.failure, tally.kinds, tally.graphs, tally.breaks, tally.recompilations) == ("", 1, 1, 0, 0)
    both(network, blocks, split, doubled=True)
    assert blocks.take_tally().recompilations == 1, "counts nothing"


def test_nothing_is_left_in_the_network(network: Model):
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    before = [dict(vars(module)) for module in network.modules()]
    blocks = compiler()
    with pytest.raises(ZeroDivisionError), blocks.on(split.blocks):
        run(network)
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in network.modules()] == before
    split.remove()
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in network.modules())


def test_the_first_block_of_a_kind_runs_with_the_others_and_the_compiled_one_beside_it(network: Model):
    """What is exchanged, and how often, is as without compilation."""
    exchanged: list[int] = []

    class Counting(Deaf):
        def attention(self, plan: Any) -> Any:
            attend = super().attention(plan)

            def counting(*args: Any) -> Any:
                exchanged.append(plan.tokens[0])
                return attend(*args)

            return counting

    split = Split(network, PLAN, Counting((1.0, 1.0)))
    run(network)
    alone = list(exchanged)
    with compiler().on(split.blocks):
        run(network)
    assert exchanged == alone * 2 and len(alone) == 3


def test_a_module_that_does_not_attend_is_noticed_in_a_graph_too(network: Model):
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = compiler()
    for _ in range(2):  # compared with the uncompiled block; compiled
        told = pytest.raises(PlanError, match=r"the attention of Model\.blocks\.attn was not split as its plan says")
        with told, blocks.on(split.blocks):
            run(network, skip_attention=True)
        assert not blocks.failure


def test_a_block_that_cannot_be_compiled_runs_as_it_is(network: Model, monkeypatch: pytest.MonkeyPatch):
    def failing(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", compile_by(failing))
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = compiler()
    both(network, blocks, split)
    assert blocks.take_tally().failure == "OSError: no compiler here"
    monkeypatch.setattr(modules_module.CompiledModules, "_run", None)
    both(network, blocks, split)  # nothing is tried any more


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("result", "compiled, its result of Block differs by 0.01"),
        ("nan", "compiled, its result of Block differs by nan"),
        ("q", "compiled, q of attention 1 of Block differs by 0.01"),
        ("attention", "compiled, the block attends 0 times, and 2 more uncompiled"),
    ],
)
def test_compiled_blocks_that_disagree_are_not_used(
    network: Model, monkeypatch: pytest.MonkeyPatch, where: str, message: str
):
    def by(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def wrong(block: Block, x: Tensor, vec: Any, transformer_options: dict[str, Any]) -> Tensor:
            if where == "attention":
                return x
            if where == "q":
                weight = block.attn.qkv.weight.clone()
                block.attn.qkv.weight[:16] *= 1.01
                block.attn.qkv.bias[:16] *= 1.01
            result = function(block, x, vec, transformer_options=transformer_options)
            if where == "q":
                block.attn.qkv.weight.copy_(weight)
                block.attn.qkv.bias[:16] /= 1.01
            return result * {"result": 1.01, "nan": float("nan")}.get(where, 1.0)

        return wrong

    monkeypatch.setattr(torch, "compile", by)
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = compiler()
    both(network, blocks, split)
    assert message in blocks.failure


def test_a_failure_inside_an_attention_is_not_covered_up(network: Model):
    """The other ranks are in it: running the block again would leave them waiting."""
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = compiler()
    both(network, blocks, split)
    with pytest.raises(RuntimeError, match="a peer is gone"), blocks.on(split.blocks):
        run(network, broken=True)
    assert not blocks.failure
    both(network, blocks, split)  # and nothing is left of it


def test_a_step_in_other_sizes_of_one_is_compared_again(network: Model, caplog: pytest.LogCaptureFixture):
    split = Split(network, PLAN, Deaf((1.0,)))
    blocks = compiler()
    with caplog.at_level("INFO", logger="sequence_parallel"):
        counts = []
        for size in (9, 12, 1):
            both(network, blocks, split, size=size)
            counts.append(caplog.text.count("(relative; allowed"))
    assert counts == [1, 1, 2]


def test_signs_of_life_during_a_compilation(network: Model, monkeypatch: pytest.MonkeyPatch):
    """A second's silence of a rank that compiles is not taken for its death; afterwards it is silent."""
    monkeypatch.setattr(compiler_module, "_SIGN_S", 0.01)
    signs: list[int] = []

    def slow(graph: Any, inputs: Any) -> Any:
        before = len(signs)
        while len(signs) < before + 5:
            torch.randn(100, 100).inverse()
        return graph

    monkeypatch.setattr(torch, "compile", compile_by(slow))
    split = Split(network, PLAN, Deaf((1.0, 1.0)))
    blocks = CompiledModules(CompileSettings(), lambda: signs.append(1), torch.device("cpu"))
    both(network, blocks, split)
    assert len(signs) >= 5 and blocks.take_tally().seconds > 0
    count = len(signs)
    both(network, blocks, split)
    assert len(signs) <= count + 1 and not blocks.failure


def test_blocks_that_take_no_options_are_left_as_they_are():
    """Their attention cannot be put into a graph: so are diffusers'."""
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(4, 4)])
    split = Split(network, {"blocks": Site(cut={"input": Tokens(V)})}, SequenceRanks((1.0,)))
    blocks, x = compiler(), torch.ones(1, 9, 4)
    with torch.no_grad(), blocks.on(split.blocks):
        assert torch.equal(network.blocks[0](x), nn.functional.linear(x, *network.blocks[0].parameters()))
    tally = blocks.take_tally()
    assert (tally.kinds, tally.graphs, tally.failure) == (0, 0, "")
