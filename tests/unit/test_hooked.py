"""Caches in a network that runs its blocks itself: what goes astray is named, and nothing is left behind. Results of
whole networks are tested in comfyui/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.cache.blocks import StepPasses, block_cache
from parallel.cache.hooked import cached_blocks
from parallel.cache.settings import CacheSettings, FirstBlockCacheSettings, TeaCacheSettings
from parallel.config import SequenceParallelConfig
from parallel.degrees import Degrees
from parallel.errors import UnsupportedError
from parallel.host.cached_sampling import CachedSampling, check_cache
from parallel.host.recipe import Recipe
from parallel.plans import comfyui, diffusers
from parallel.plans.libraries import CHAINS
from parallel.split import PlanError, SequenceRanks, Site, Split
from parallel.split.chain import Chain
from parallel.split.handing_on import skippable
from parallel.split.routes import ThroughTorch
from parallel.split.rules import Tokens

CPU = torch.device("cpu")
PLAN = {"blocks": Site(cut={"x": Tokens(("image",))})}
CHAIN = Chain(blocks={"blocks": "x"}, hidden="x", modulated="linear")


class Block(nn.Module):
    """Works in place, as ComfyUI's do."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        nn.init.constant_(self.linear.weight, weight)
        nn.init.zeros_(self.linear.bias)
        self.runs = 0

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        added = self.linear(x)
        self.runs += 1
        x += added
        return x


class Network(nn.Module):
    """Adds 100 between its blocks, as ControlNet does; of `blocks` it runs those of `which`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1.0), Block(2.0), Block(3.0)])
        self.which = slice(None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for number, block in enumerate(self.blocks):
            if number in range(3)[self.which]:
                x = block(x)
                if number < 2:
                    x += 100
        return x


class Cached:
    """A network on one rank under a cache."""

    def __init__(self, kind: str = "first_block", threshold: float = 1e9, ranks: SequenceRanks | None = None):
        rule = {"first_block": {"most_in_a_row": 0}, "teacache": {"coefficients": [1.0, 0.0]}}[kind]
        self.network, self.chain, self.sums = Network(), CHAIN, []
        self.split = Split(self.network, PLAN, ranks or SequenceRanks((1.0,)), ThroughTorch)
        self.cache = block_cache({"kind": kind, "threshold": threshold, **rule}, CPU)

    @torch.no_grad()
    def __call__(self, value: float, active: bool = True, tokens: int = 4) -> float:
        self.cache.begin_step(Degrees(), active)
        passes = StepPasses(self.cache, "cond", (), lambda sums: self.sums.append(sums.tolist()))
        with cached_blocks(self.network, PLAN, self.chain, self.split, passes):
            return self.network(torch.full((1, tokens, 1), value))[0, 0, 0].item()

    @property
    def runs(self) -> list[int]:
        return [block.runs for block in self.network.blocks]


def test_a_hit_adds_to_this_steps_first_block_what_the_others_have_added() -> None:
    cached = Cached()
    assert cached(1.0) == (((1 * 2 + 100) * 3) + 100) * 4
    assert cached(2.0) == 2 * 2 + (1624 - 2)
    assert cached.runs == [2, 1, 1]
    assert (cached.cache.tally.passes, cached.cache.tally.hits) == (1, 1)


def test_a_hit_of_teacache_adds_to_this_steps_input_and_runs_no_block() -> None:
    cached = Cached("teacache")
    assert cached(1.0) == 1624
    assert cached(2.0) == 2 + (1624 - 1)
    assert cached.runs == [1, 1, 1]


@pytest.mark.parametrize(("rank", "sums"), [(0, [[1.0], [1.0]]), (2, [[0.0], [0.0]])])
def test_a_rank_without_a_token_has_no_say(rank: int, sums: list[list[float]]) -> None:
    """Of two tokens the third rank has a phantom, which no other rank sees."""
    cached = Cached(ranks=SequenceRanks((1, 1, 1), rank))
    for value in (1.0, 2.0):
        cached(value, tokens=2)
    assert cached.sums == [sums]


@pytest.mark.parametrize("kind", ["first_block", "teacache"])
def test_threshold_zero_and_inactive_steps_compute_everything(kind: str) -> None:
    cached = Cached(kind, 0.0)
    assert [cached(1.0), cached(1.0), cached(1.0, active=False)] == [1624] * 3
    assert (cached.runs, cached.cache.tally.passes, cached.cache.tally.hits) == ([3, 3, 3], 1, 0)


def test_nothing_is_left_behind_even_by_a_call_that_fails() -> None:
    cached = Cached()
    mine = cached.network.blocks[2].forward
    cached.network.blocks[2].__dict__["forward"] = mine  # as one that has been compiled

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("stopped")

    handle = cached.network.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        cached(1.0)
    handle.remove()
    assert [block.__dict__.get("forward") for block in cached.network.blocks] == [None, None, mine]
    assert [cached(1.0), cached(2.0)] == [1624, 4 + 1622], "the failed step is not remembered"


@pytest.mark.parametrize(
    ("chain", "which", "message"),
    [
        (replace(CHAIN, blocks={"layers": "x"}), slice(None), "Network has no module 'layers'"),
        (replace(CHAIN, blocks={"blocks": "y"}), slice(None), r"no argument 'y' of blocks.0 \(Block: x, by\)"),
        (CHAIN, slice(1, None), "Network did not run blocks"),
        (CHAIN, slice(0, 2), "Network left its blocks without passing the last one"),
    ],
)
def test_what_goes_astray_is_named(chain: Chain, which: slice, message: str) -> None:
    cached = Cached()
    cached.chain, cached.network.which = chain, which
    with pytest.raises(PlanError, match=message):
        cached(1.0)


def test_a_hidden_input_that_is_not_reached_is_named() -> None:
    cached = Cached("teacache")
    cached.network.blocks[0].other = nn.Identity()
    cached.chain = replace(CHAIN, modulated="other")
    with pytest.raises(PlanError, match="Block does not call other, whose input TeaCache compares"):
        cached(1.0)


# --- the host's part ------------------------------------------------------------------------------------------------

FIRST, TEA = FirstBlockCacheSettings(residual_diff_threshold=0.1), TeaCacheSettings(rel_l1_thresh=0.1)
WAN = {"num_heads": 12, "in_dim": 16, "out_dim": 16, "model_type": "t2v"}
DIFFUSERS_WAN = {"num_attention_heads": 12, "in_channels": 16, "out_channels": 16, "image_dim": None}
COGVIDEOX = {"num_attention_heads": 30, "in_channels": 16}


def recipe(network: str, arguments: dict[str, Any] | None = None, library: Any = "comfyui") -> Recipe:
    """Of a network of which only its class and arguments matter."""
    return Recipe(
        library=library,
        path="model",
        weight_dtype=None,
        network=network,
        config=SequenceParallelConfig(devices="cpu"),
        nbytes=0,
        in_the_file=0,
        heads=1,
        arguments=arguments or {},
        channels=16,
        linear=(),
    )


def test_chains_name_lists_and_arguments_of_their_plans() -> None:
    for library in (comfyui, diffusers):
        for network, chain in library.CHAINS.items():
            plan = library.PLANS[network]
            for each in plan.plans if isinstance(plan, comfyui.ByModel) else [plan]:
                first = next(iter(chain.blocks))
                assert chain.hidden in each[first].cut, network


@pytest.mark.parametrize(
    ("library", "network", "config"),
    [
        ("comfyui", "WanModel", WAN),
        ("comfyui", "Flux", {"image_model": "flux", "vec_in_dim": 768}),
        ("comfyui", "HunyuanVideo", {"vec_in_dim": 768}),
        ("comfyui", "LTXVModel", {"num_layers": 28}),
        ("comfyui", "CogVideoXTransformer3DModel", COGVIDEOX),
        ("diffusers", "WanTransformer3DModel", DIFFUSERS_WAN),
        ("diffusers", "CogVideoXTransformer3DModel", COGVIDEOX | {"patch_size_t": None}),
    ],
)
def test_teacache_takes_networks_whose_polynomial_is_published(library: str, network: str, config: Any) -> None:
    check_cache(TEA, recipe(network, config, library))


@pytest.mark.parametrize(
    ("settings", "network", "config", "message"),
    [
        (TEA, "SingleStreamDiT", {}, "published for SingleStreamDiT; use First Block Cache"),
        (TEA, "VaceWanModel", WAN, "published for VaceWanModel"),
        (TEA, "Flux", {"image_model": "flux", "vec_in_dim": None}, "published for this model of the class Flux"),
        (TEA, "Flux", {"image_model": "flux2", "vec_in_dim": 768}, "published for this model of the class Flux"),
        (TEA, "HunyuanVideo", {"vec_in_dim": None}, "published for this model of the class HunyuanVideo"),
        (TEA, "WanModel", WAN | {"in_dim": 36}, "published for this Wan model .in_channels 36"),
        (TEA, "LTXVModel", {"num_layers": 48}, "published for this LTXV model .48 layers"),
        (
            FIRST,
            "NewModel",
            {},
            r"First Block Cache \(SP\) cannot skip blocks of NewModel: .* Anima, AsymmDiTJoint, Audio",
        ),
    ],
)
def test_what_cannot_be_skipped_is_refused_by_name(
    settings: CacheSettings, network: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_cache(settings, recipe(network, config))


@pytest.mark.parametrize(
    ("settings", "network", "config", "message"),
    [
        (TEA, "FluxTransformer2DModel", {}, "published for FluxTransformer2DModel; use First Block Cache"),
        (TEA, "HunyuanVideoTransformer3DModel", {}, "published for HunyuanVideoTransformer3DModel; use First"),
        (TEA, "WanTransformer3DModel", DIFFUSERS_WAN | {"num_attention_heads": 2}, "this Wan model .*, 2 heads"),
        (FIRST, "Flux", {}, "cannot skip blocks of Flux: .*FluxTransformer2DModel"),
    ],
)
def test_what_cannot_be_skipped_of_diffusers_is_refused_by_name(
    settings: CacheSettings, network: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_cache(settings, recipe(network, config, "diffusers"))


def test_first_block_cache_takes_every_network_that_says_so() -> None:
    for library, chains in CHAINS.items():
        for network in chains:
            check_cache(FIRST, recipe(network, library=library))


def test_references_choose_the_polynomial_of_kontext() -> None:
    sampling = CachedSampling(TEA)
    config = {"image_model": "flux", "vec_in_dim": 768}
    shapes = {"x": (1, 16, 8, 8)}
    plain, kontext = (
        sampling.message(0.5, recipe("Flux", config), more).rule["coefficients"]
        for more in (shapes, shapes | {"ref_latents.0": (1, 16, 4, 4)})
    )
    assert plain != kontext


@pytest.mark.parametrize("plan", [PLAN, {}], ids=["plan", "no plan"])
def test_a_block_that_a_node_skips_hands_on_what_comes_in(plan: dict[str, Site]) -> None:
    network = Network()
    split = Split(network, plan, SequenceRanks((1.0,)), ThroughTorch)
    x = torch.ones(1, 2, 1)
    with skippable(network, plan, CHAIN.blocks, split) as skip:
        result = skip({"img": x}, {"original_block": lambda args: {"img": network.blocks[0](args["img"])}})
        assert torch.equal(result["img"], torch.ones(1, 2, 1)) and not network.blocks[0].runs
        assert network.blocks[1](x) is x and network.blocks[1].runs, "only this one is skipped"
    assert "forward" not in vars(network.blocks[0])
