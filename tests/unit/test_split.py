"""Split plans: what is cut and joined on one rank's view, and what is refused, by name. Results of whole models are
tested in distributed/ and comfyui/."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.attention.kernels import Kernel
from parallel.parallelize import parallelize
from parallel.plan import AttentionPlan
from parallel.split import PlanError, SequenceRanks, Site, Split
from parallel.split.routes import ComfyRoute, ThroughTorch
from parallel.split.rules import (
    Before,
    Behind,
    Cropped,
    Grid,
    Grouped,
    Last,
    Own,
    OwnGroups,
    Ranges,
    Residuals,
    SampleLengths,
    Tokens,
    Trimmed,
    WholeGroups,
)
from parallel.split.streams import Streams

T, I, TI = ("text",), ("image",), ("text", "image")  # noqa: E741


def streams_of(weights: tuple[float, ...], rank: int, **totals: int) -> Streams:
    streams = Streams(SequenceRanks(weights, rank))
    for name, total in totals.items():
        streams.define(name, total)
    return streams


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (2.0, 1.0, 1.0), (7.0, 2.0, 1.0)])
def test_the_ranks_parts_are_the_whole(weights: tuple[float, ...]):
    value = torch.arange(13.0).reshape(1, 13, 1)
    parts = [Tokens(I).cut(value, streams_of(weights, rank)) for rank in range(len(weights))]
    assert torch.equal(torch.cat(parts, 1), value)


def test_a_part_is_a_copy_so_that_blocks_may_work_in_place():
    value = torch.ones(1, 8, 2)
    Tokens(I).cut(value, streams_of((1, 1), 0)).zero_()
    assert torch.equal(value, torch.ones(1, 8, 2))


def test_a_rank_without_a_token_gets_a_phantom_that_no_join_sees():
    streams = streams_of((1, 1, 1), 2, text=2, image=5)
    assert streams.counts(T) == (1, 1, 0)
    value = torch.arange(7.0).reshape(1, 7, 1)
    mine = Tokens(TI).cut(value, streams)
    assert mine.shape[1] == 2 and mine[0, 1, 0] == value[0, 6, 0]
    assert torch.equal(streams.without_phantoms(mine, TI, 1), value[:, 6:])
    assert streams.with_phantoms(value[:, 6:], TI, 1).flatten().tolist() == [0, 6]


def test_what_is_cut_already_passes_and_other_lengths_do_not():
    streams = streams_of((1, 1), 0, image=9)
    assert Tokens(I).cut(torch.ones(1, 5, 2), streams).shape[1] == 5
    assert Tokens(I).cut(torch.ones(1, 1, 2), streams).shape[1] == 1
    with pytest.raises(PlanError, match="neither 1, the whole 9 tokens of image, nor this rank's 5"):
        Tokens(I).cut(torch.ones(1, 7, 2), streams)


def test_padding_is_trimmed_only_where_that_is_exact():
    seen = torch.tensor([[[[True] * 3 + [False] * 2 + [True] * 6]]])
    streams = streams_of((1, 1), 0, image=6)
    assert Trimmed(TI).cut(seen, streams) is None
    assert (streams.total(T), streams.counts(T)) == (5, (2, 1))
    weighs = torch.zeros(1, 1, 1, 11).index_fill_(3, torch.tensor([2]), -0.5)
    without_an_image_token = seen.clone()
    without_an_image_token[..., -1] = False
    unlike = torch.cat([seen, torch.ones_like(seen)])
    for mask in (weighs, without_an_image_token, unlike):
        assert Trimmed(TI).cut(mask, streams_of((1, 1), 0, image=6)) is mask


class Adds(nn.Module):
    """A block of which `scale` depends on `factor`, which differs from block to block."""

    def forward(self, x: Tensor, table: Tensor, scale: Tensor, factor: float) -> Tensor:
        return x + table + scale


class GivesAlike(nn.Module):
    """All blocks are given the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adds(), Adds(), Adds()])

    def forward(self, x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, table, scale, float(number))
        return x


class TimesFactor:
    """A rule that looks at another argument."""

    def cut(self, value: Tensor, streams: Streams) -> Tensor:
        return value * streams.given["factor"]


@pytest.mark.parametrize("gradients", [False, True])
def test_what_all_blocks_share_is_cut_once_and_what_depends_on_another_argument_each_time(gradients: bool):
    network, seen = GivesAlike(), []
    split = Split(
        network,
        {"blocks": Site(cut={"x": Tokens(I), "table": Tokens(I), "scale": TimesFactor()})},
        SequenceRanks((1.0, 1.0), 1),
    )
    x, table = torch.arange(6.0).reshape(1, 6, 1), torch.arange(6.0).reshape(1, 6, 1)
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.set_grad_enabled(gradients):
        out = network(x, table.requires_grad_(gradients), torch.ones(1))
    tables = [args[1] for args in seen]
    assert len(tables) == 3 and all(torch.equal(each, table[:, 3:]) for each in tables)
    assert (tables[0] is tables[1]) != gradients, "under checkpointing a block does again what it did"
    assert torch.equal(out, x[:, 3:] + 3 * table[:, 3:] + 3), "0 + 1 + 2 times the scale"
    split.remove()


class GivesInTurn(nn.Module):
    """Each block is given another tensor: whole tokens, or this rank's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Doubles() for _ in range(count))

    def forward(self, values: list[Tensor]) -> list[Tensor]:
        return [block(value) for block, value in zip(self.blocks, values, strict=True)]


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_whole_and_own_tokens_may_come_in_turn():
    network = GivesInTurn(6)
    split = Split(network, {"blocks": Site(cut={"x": Tokens(I)})}, SequenceRanks((1.0, 1.0), 1))
    whole, own = torch.arange(6.0).reshape(1, 6, 1), torch.full((1, 3, 1), 7.0)
    results = network([whole, own, whole + 1, own + 1, torch.ones(1, 1, 1), own])
    wanted = [whole[:, 3:], own, whole[:, 3:] + 1, own + 1, torch.ones(1, 1, 1), own]
    assert all(torch.equal(result, 2 * each) for result, each in zip(results, wanted, strict=True))
    with pytest.raises(PlanError, match=r"blocks.2 \(Doubles\): x of shape \[1, 4, 1\]: dim 1 is neither"):
        network([whole, own, torch.ones(1, 4, 1), own, own, own])
    split.remove()


def test_attention_may_be_called_by_places():
    """As ComfyUI's functions may: no argument is lost."""
    seen = []

    def function(q: Tensor, *_: Any, attn_precision: Any = None, **named: Any) -> Tensor:
        seen.append((attn_precision, named["mask"], named["skip_reshape"], named["skip_output_reshape"]))
        return q

    route = ComfyRoute(lambda: streams_of((1.0,), 0, image=5), (I, I), "kind", "where")
    mask, apart, flat = torch.ones(5, 5), torch.ones(1, 2, 5, 4), torch.ones(1, 5, 8)
    assert route(function, apart, apart, apart, 2, mask, torch.float32, True, True).shape == (1, 2, 5, 4)
    assert route(function, flat, flat, flat, 2, mask).shape == (1, 5, 8)
    assert seen == [(torch.float32, mask, True, True), (None, mask, True, True)]


class AddsTable(nn.Module):
    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return x + tables[0]


class GivesTables(nn.Module):
    """All blocks are given the same pair, as rotary tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([AddsTable(), AddsTable()])

    def forward(self, x: Tensor) -> Tensor:
        tables = (torch.zeros_like(x), torch.zeros_like(x))
        for block in self.blocks:
            x = block(x, tables)
        return x


def test_what_was_cut_goes_with_the_pass_and_not_when_garbage_is_collected():
    network, seen = GivesTables(), []
    site = Site(cut={"x": Tokens(I), "tables": (Tokens(I), Tokens(I))})
    split = Split(network, {"blocks": site}, SequenceRanks((1.0, 1.0), 0))
    network.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[1][0])))
    gc.disable()
    try:
        with torch.no_grad():
            network(torch.ones(1, 6, 1))
        assert seen[0]() is None
    finally:
        gc.enable()
    split.remove()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranges_and_groups_and_numbers_follow_the_tokens(rank: int):
    streams = streams_of((1, 1), rank, image=6)
    assert Ranges(I).cut([(0, 2, "a"), (2, None, "b")], streams) == [[(0, 2, "a"), (2, 3, "b")], [(0, 3, "b")]][rank]
    assert Before(I).cut(4, streams) == [3, 1][rank]
    per_frame = torch.tensor([[[10.0], [20.0], [30.0]]])
    assert Grouped("image", 3).cut(per_frame, streams).flatten().tolist() == [[10, 10, 20], [20, 30, 30]][rank]
    with pytest.raises(PlanError, match="4 groups along dim 1 do not divide the 6 tokens of image"):
        Grouped("image", 3).cut(torch.ones(1, 4, 1), streams)


def test_residuals_are_cut_when_taken_out():
    streams = streams_of((1, 1), 1, image=4)
    lists = Residuals(Tokens(I)).cut({"output": [torch.arange(4.0)[None, :, None], None]}, streams)
    assert lists["output"].pop() is None
    assert lists["output"].pop().flatten().tolist() == [2, 3] and not lists["output"]


def test_residuals_are_cut_when_read_and_references_get_none():
    streams = Streams(SequenceRanks((1, 1), 1))
    lists = Residuals(Tokens(I)).cut({"input": [torch.ones(1, 4, 2), None]}, streams)
    streams.define("image", 6)
    assert lists["input"][0].flatten().tolist() == [1, 1, 0, 0, 0, 0] and lists["input"][1] is None
    with pytest.raises(PlanError, match="a control residual of 7 tokens, 1 more than image has"):
        Residuals(Tokens(I)).cut([torch.ones(1, 7, 2)], streams)[0]


def test_a_grid_is_joined_in_its_shape():
    streams = streams_of((1,), 0)
    value = torch.randn(1, 2, 3, 4, 5)
    assert Grid("video").join(Grid("video").cut(value, streams), streams).equal(value)


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), [2, 4]), ((1, 4, 1), [0, 5, 1])])
def test_values_of_the_last_tokens_are_these_tokens(weights: tuple[float, ...], counts: list[int]):
    value = torch.arange(6.0)[None, :, None]
    parts = [Last(I).cut(value, streams_of(weights, rank, image=8)) for rank in range(len(weights))]
    assert [part.shape[1] for part in parts] == counts and torch.equal(torch.cat(parts, 1), value)


def test_a_rank_goes_on_with_its_own_part_of_a_whole_result():
    whole = torch.arange(5.0)[None, :, None]
    assert Own(Tokens(I)).join(whole, streams_of((1, 1), 1, image=5)).flatten().tolist() == [3, 4]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 2.0, 1.0), (1.0,) * 20])
def test_a_rank_counts_its_tokens_of_each_sample(weights: tuple[float, ...]):
    """A rank without a token has a phantom, of the first sample."""

    @dataclass
    class Sizes:
        video: Tensor
        text: int

    lengths, counts = Sizes(torch.tensor([9, 4, 5]), 7), []
    for rank in range(len(weights)):
        streams = streams_of(weights, rank, video=18)
        own = SampleLengths("video", "video").cut(lengths, streams)
        assert own.text == 7 and int(own.video.sum()) == streams.local(("video",))
        counts.append(own.video)
    phantoms = sum(count == 0 for count in streams.counts(("video",)))
    assert sum(counts).tolist() == [9 + phantoms, 4, 5]


def test_heads_of_queries_stay_with_their_keys():
    plan = AttentionPlan((5, 4), (3, 3), heads=6, groups=3, weights=(2.0, 1.0))
    assert plan.local_groups == (2, 1) and plan.local_heads == (4, 2) and not plan.joint


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor | None = None, extra: Any = None) -> Tensor:
        return img + self.attn(txt).mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, img: Tensor, txt: Tensor, **more: Any) -> Tensor:
        for block in self.blocks:
            img = block(img, txt, **more)
        return img


PLAN = {"blocks": Site(cut={"img": Tokens(I)}, whole="txt vec")}
TWO = SequenceRanks((1, 1), 0)
IMG, TXT = torch.ones(1, 6, 2), torch.ones(1, 3, 2)


def test_hooks_cut_and_leave_no_trace():
    model = Model()
    split = Split(model, PLAN, TWO)
    assert model(IMG, TXT).shape[1] == 3
    split.remove()
    assert model(IMG, TXT).shape[1] == 6
    modules = list(model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in modules)


def test_a_failed_installation_leaves_no_trace():
    model = Model()
    with pytest.raises(PlanError):
        Split(model, PLAN | {"head": Site()}, TWO)
    assert model(IMG, TXT).shape[1] == 6


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (
            {"blocks": Site(cut={"image": Tokens(I)})},
            r"Model.blocks.0 \(Block\) has no argument 'image'.*it has: img, txt",
        ),
        ({"blocks": Site(cut=PLAN["blocks"].cut, whole="text")}, "has no argument 'text'"),
        ({"layers": Site()}, "names the module 'layers', which Model has not; it has: blocks"),
        (
            {"blocks": Site(attention={"attention": (I, I)})},
            "names the module 'attention', which Model.blocks.0 has not",
        ),
    ],
)
def test_a_model_that_has_changed_is_refused_by_name(plan: Any, complaint: str):
    with pytest.raises(PlanError, match=complaint):
        Split(Model(), plan, TWO)


def test_arguments_that_older_versions_lack_are_marked():
    Split(Model(), {"blocks": Site(cut={"img": Tokens(I), "newer?": Tokens(I)}, whole="txt vec newest?")}, TWO)


def test_an_argument_that_the_plan_does_not_know_is_refused_when_it_is_given():
    model = Model()
    Split(model, PLAN, TWO)
    model(IMG, TXT, extra=None)
    with pytest.raises(
        PlanError, match=r"Model.blocks.0 \(Block\) is given extra of shape \[2, 3\], which its plan does not"
    ):
        model(IMG, TXT, extra=torch.ones(2, 3))


def test_a_value_that_does_not_fit_is_named_with_its_shape():
    model = Model()
    Split(model, {"blocks": Site(cut={"img": Tokens(I, 5)})}, TWO)
    with pytest.raises(
        PlanError, match=r"Model.blocks.0 \(Block\): img of shape \[1, 6, 2\]: expected a tensor .* dim 5"
    ):
        model(IMG, TXT)


def test_attention_that_goes_another_way_is_refused():
    model = Model()
    Split(model, {"blocks": Site(cut={"img": Tokens(I)}, attention={"attn": (I, I)})}, TWO, ThroughTorch)
    with pytest.raises(PlanError, match=r"the attention of Model\.blocks\.attn was not split as its plan says"):
        model(IMG, TXT)


def test_causal_attention_is_refused():
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = Model()
    model.blocks[0].attn = Causal()
    Split(model, {"blocks": Site(cut={"img": Tokens(I)}, attention={"attn": (T, T)})}, TWO, ThroughTorch)
    with pytest.raises(PlanError, match="causal attention depends on the order of tokens"):
        model(IMG, TXT)
    assert F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3, is_causal=True).shape == (1, 1, 2, 2)


def test_parallelize_names_what_it_cannot_use(monkeypatch: pytest.MonkeyPatch):
    class Mesh:
        ndim, mesh_dim_names = 2, ("dp", "tp")

        def size(self, dim: int | None = None) -> int:
            return 2

    with pytest.raises(ValueError, match=r"mesh has the axes \('dp', 'tp'\); allowed are one axis, or"):
        parallelize(Model(), Mesh())  # type: ignore[arg-type]
    monkeypatch.setattr(Mesh, "ndim", 1)
    with pytest.raises(ValueError, match="model is a Model; plans exist for CogVideoX"):
        parallelize(Model(), Mesh())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights is \[1, 0\]; expected 2 numbers above 0"):
        parallelize(Model(), Mesh(), weights=[1, 0])  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 2.0, 1.0), (1.0,) * 8])
def test_a_group_is_whole_on_each_rank_that_has_some_of_it(weights: tuple[float, ...]):
    """3 frames of 5 tokens with 2 rows each, and 2 references behind them: every token meets its own frame's rows."""
    rows, hidden = torch.arange(1.0, 7).reshape(1, 6, 1), torch.zeros(1, 17, 1)
    parts = []
    for rank in range(len(weights)):
        streams = streams_of(weights, rank, video=17)
        streams.given = {"framed": 15}
        mine = OwnGroups("video", 2, until="framed").cut(rows, streams)
        x = WholeGroups("video").cut(Tokens(("video",)).cut(hidden, streams), streams)
        framed = WholeGroups("video").cut(15, streams)
        assert framed % 5 == 0 and mine.shape[1] == framed // 5 * 2
        x[:, :framed] += mine.reshape(-1, 1, 2).sum(2).repeat_interleave(5, 0)
        parts.append(streams.without_phantoms(WholeGroups("video").join(x, streams), ("video",), 1))
    assert torch.cat(parts, 1).flatten().tolist() == [3] * 5 + [7] * 5 + [11] * 5 + [0] * 2


def test_groups_that_do_not_divide_the_tokens_are_refused():
    with pytest.raises(PlanError, match="dim 1 is not 1 rows for each of some groups of 17 tokens"):
        OwnGroups("video").cut(torch.ones(1, 3, 1), streams_of((1, 1), 0, video=17))
    with pytest.raises(PlanError, match="3 groups along dim 1 do not divide the 8 tokens"):
        Grouped("video", 3).cut(torch.ones(1, 3, 1), streams_of((1, 1), 0, video=8))


def test_the_last_group_may_be_cut_off():
    """As Wan repeats its modulations: 3 rows for 8 tokens are 3 + 3 + 2."""
    per_frame = torch.tensor([[[10.0], [20.0], [30.0]]])
    parts = [Grouped("video", 3, cut_off=True).cut(per_frame, streams_of((1, 1), rank, video=8)) for rank in (0, 1)]
    assert torch.cat(parts, 1).flatten().tolist() == [10] * 3 + [20] * 3 + [30] * 2


def test_a_number_crops_a_stream():
    streams = streams_of((1, 1), 1, image=4)
    streams.given = {"y": torch.ones(1, 9, 1)}
    assert Cropped("text", of="y").cut(5, streams) == 2
    assert (streams.total(T), streams.counts(T)) == (9, (3, 2))
    assert Tokens(T).cut(torch.arange(9.0).reshape(1, 9, 1), streams).flatten().tolist() == [3, 4]


def test_what_is_behind_a_stream_is_cut_and_joined():
    value = torch.cat([torch.full((1, 2, 1), 7.0), torch.arange(5.0).reshape(1, 5, 1)], 1)
    streams = streams_of((1, 1), 0, image=4, text=5)
    assert Behind("image", Tokens(T)).cut(value, streams).flatten().tolist() == [7, 7, 0, 1, 2]


def test_a_mask_that_stays_is_cut_where_the_model_compares_its_length():
    unlike = torch.tensor([[[[True] * 11]], [[[True] * 10 + [False]]]])
    streams = streams_of((1, 1), 0, image=6)
    assert Trimmed(TI, stays_whole=False).cut(unlike, streams).shape[-1] == streams.local(TI) == 6


class Inner(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y + y.shape[1]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Outer(), Outer()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Doubling(SequenceRanks):
    """As if all ranks had what this one has."""

    def gather(self, x: Tensor, dim: int, counts: Any) -> Tensor:
        return torch.cat([x] * self.size, dim)


def test_a_module_of_each_block_is_a_site_and_each_block_may_join():
    """Two tokens are one on this rank; each inner module sees one, each block gives two."""
    model = Stack()
    plan = {"blocks": Site(join_each=Tokens(I)), "blocks.*.inner": Site(cut={"y": Tokens(I)}, whole="")}
    split = Split(model, plan, Doubling((1, 1), 0))
    assert model(torch.zeros(1, 2, 1)).flatten().tolist() == [2, 2]
    split.remove()
    assert model(torch.zeros(1, 2, 1)).flatten().tolist() == [4, 4]


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
    """As ComfyUI's models import it."""
    named.pop("mask", None)
    assert named.pop("skip_reshape") and named.pop("skip_output_reshape")
    return F.scaled_dot_product_attention(q, k, v)


class Optionless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return optimized_attention(x, x, x, heads=1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Optionless()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


class Noted(SequenceRanks):
    """Ranks whose attention is computed here, and counted."""

    attended = 0

    def attention(self, plan: Any) -> Any:
        self.attended += 1
        return lambda q, k, v, compute, mask: compute(q, k, v)


@pytest.mark.parametrize("fails", [False, True])
def test_attention_of_modules_without_options_is_routed_while_they_run(fails: bool, monkeypatch: pytest.MonkeyPatch):
    before = optimized_attention
    ranks, model = Noted((1, 1), 0), Attending()
    Split(model, {"blocks": Site(cut={"x": Tokens(I)}, attention={"": (I, I)})}, ranks)
    if fails:
        monkeypatch.setattr(ranks, "attention", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(1, 4, 8))
    else:
        assert model(torch.randn(1, 4, 8)).shape == (1, 2, 8)
        assert ranks.attended == 1
    assert optimized_attention is before


class Named(Kernel):
    """Notes how many heads of keys it is given."""

    name = "named"

    def __init__(self) -> None:
        self.keys: list[int] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k.shape[1])
        return q + 1

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Wrapped(nn.Module):
    """A block that hands on what it is given, and attends in two ways, by values whose heads are apart already."""

    def forward(self, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        text, image = args
        override = kwargs["transformer_options"]["optimized_attention_override"]
        both = torch.cat([text, image], 1)
        both = override(optimized_attention, both, both, both.unflatten(2, (2, 4)), heads=2)
        alone = override(optimized_attention, image, image, image, heads=2)
        return both[:, : text.shape[1]], both[:, text.shape[1] :] + alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_names_what_has_no_names_and_attends_to_several_streams(rank: int):
    ranks, model = Noted((2, 1), rank), nn.Module()
    model.blocks = nn.ModuleList([Wrapped()])
    site = Site(
        positional="text image",
        cut={"text": Tokens(T), "image": Tokens(I)},
        whole="",
        attention={"": [(TI, TI), (I, I)]},
    )
    split = Split(model, {"blocks": site}, ranks)
    text, image = torch.randn(1, 1, 8), torch.randn(1, 6, 8)  # the second rank's text is a phantom
    split._begin(model, ())
    found = model.blocks[0](text, image, transformer_options={})
    assert [x.shape[1] for x in found] == [1, 4 - 2 * rank] and ranks.attended == 2
    with pytest.raises(PlanError, match=r"is given args of shape .*, which its plan does not know"):
        model.blocks[0](text, image, image, transformer_options={})
    split.remove()
    split = Split(model, {"blocks": replace(site, attention={"": [(I, I), (T, T)]})}, ranks)
    split._begin(model, ())
    with pytest.raises(PlanError, match=r"attention of \d queries with \d keys, where this rank has .* or 1 of text"):
        model.blocks[0](text, image, transformer_options={})


@pytest.mark.parametrize("mask", [False, True])
def test_a_kernel_that_the_user_has_chosen_computes_what_has_no_mask_also_on_one_rank(mask: bool):
    kernel = Named()
    streams = Streams(SequenceRanks((1.0,), chosen=kernel))
    route = ComfyRoute(lambda: streams, (I, I), "kind", "where")
    assert not route.alone and ComfyRoute(lambda: streams_of((1,), 0), (I, I), "kind", "where").alone

    def own(q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
        return q + 2

    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    seen = torch.ones(1, 1, 1, 3, dtype=torch.bool) if mask else None
    more = {"mask": seen, "skip_reshape": True, "skip_output_reshape": True, "transformer_options": {}}
    out = route(own, q, k, k, 4, **more)
    assert (out == (2 if mask else 1)).all()
    assert kernel.keys == ([] if mask else [4])


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_an_attention_that_a_file_chooses_computes_unless_the_user_overrides_it(override: bool, known: bool):
    def attention(value: float) -> Any:
        return lambda q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **named: q + value

    streams = Streams(SequenceRanks((1.0,)))
    route = ComfyRoute(lambda: streams, (I, I), "kind", "where")
    options = {"sequence_parallel_users_override": lambda function, *args, **named: attention(4)(*args, **named)}
    chosen = SimpleNamespace(function=attention(2) if known else None)
    q = torch.zeros(1, 4, 3, 8)
    named = {"preferred_attention": chosen, "transformer_options": options if override else {}}
    out = route(attention(1), q, q, q, 4, skip_reshape=True, skip_output_reshape=True, **named)
    assert (out == (4 if override else 2 if known else 1)).all()
