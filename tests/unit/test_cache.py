"""Settings, TeaCache's polynomials, and the decisions of a cache on one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from parallel.cache import coefficients
from parallel.cache.blocks import BlockCache, block_cache, relative_changes
from parallel.cache.settings import CacheSettings, FirstBlockCacheSettings, TeaCacheSettings
from parallel.degrees import Degrees
from parallel.errors import ConfigError, UnsupportedError
from parallel.host.cached_sampling import CachedSampling

CPU = torch.device("cpu")
TWO = Degrees(ulysses=2)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FirstBlockCacheSettings(residual_diff_threshold=-0.1), "residual_diff_threshold is -0.1; allowed are"),
        (lambda: FirstBlockCacheSettings(residual_diff_threshold=float("nan")), "residual_diff_threshold is nan"),
        (lambda: TeaCacheSettings(rel_l1_thresh=float("inf")), "rel_l1_thresh is inf"),
        (
            lambda: TeaCacheSettings(rel_l1_thresh=0.1, start_percent=0.5, end_percent=0.4),
            r"start_percent is 0.5 and end_percent 0.4; allowed are 0 to 1",
        ),
        (lambda: TeaCacheSettings(rel_l1_thresh=0.1, end_percent=1.1), "end_percent 1.1"),
        (
            lambda: FirstBlockCacheSettings(residual_diff_threshold=0.1, max_consecutive_hits=-1),
            r"max_consecutive_hits is -1; allowed are 0 \(no limit\)",
        ),
        (
            lambda: FirstBlockCacheSettings(residual_diff_threshold=0.1, max_consecutive_hits=1.5),  # type: ignore[arg-type]
            "max_consecutive_hits is 1.5",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(make: Callable[[], CacheSettings], message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "settings", [FirstBlockCacheSettings(residual_diff_threshold=0.1), TeaCacheSettings(rel_l1_thresh=0.1)]
)
def test_a_rule_survives_json(settings: CacheSettings):
    rule = json.loads(json.dumps(settings.rule("flux", {})))
    assert isinstance(block_cache(rule, CPU), BlockCache)


# --- TeaCache's polynomials ---------------------------------------------------------------------------------------


def wan(heads: int, channels: int = 16, image: int | None = None, out: int = 16) -> dict[str, Any]:
    return {"num_attention_heads": heads, "in_channels": channels, "out_channels": out, "image_dim": image}


def ltxv(layers: int, *, causal: bool) -> dict[str, Any]:
    return {"num_layers": layers, "causal_temporal_positioning": causal}


def cogvideox(heads: int, channels: int, frames: int | None) -> dict[str, Any]:
    return {"num_attention_heads": heads, "in_channels": channels, "patch_size_t": frames}


@pytest.mark.parametrize(
    ("family", "config", "shapes", "expected"),
    [
        ("hunyuan_video", {}, None, coefficients.HUNYUAN_VIDEO),
        ("flux", {}, {"x": (1, 16, 128, 128)}, coefficients.FLUX),
        ("flux", {}, {"x": (1, 16, 128, 128), "ref_latents.0": (1, 16, 64, 64)}, coefficients.FLUX_KONTEXT),
        ("mochi", {}, None, coefficients.MOCHI),
        ("ltxv", ltxv(28, causal=False), None, coefficients.LTXV),
        ("wan", wan(12), {"x": (1, 16, 21, 60, 104)}, coefficients.WAN_T2V_1_3B),
        ("wan", wan(40), {"x": (1, 16, 21, 90, 160)}, coefficients.WAN_T2V_14B),
        ("wan", wan(40, 36, 1280), {"x": (1, 36, 21, 60, 104)}, coefficients.WAN_I2V_480P),
        ("wan", wan(40, 36, 1280), {"x": (1, 36, 21, 104, 60)}, coefficients.WAN_I2V_480P),
        ("wan", wan(40, 36, 1280), {"x": (1, 36, 21, 90, 160)}, coefficients.WAN_I2V_720P),
        ("cogvideox", cogvideox(30, 16, None), None, coefficients.COGVIDEOX_2B),
        ("cogvideox", cogvideox(48, 32, None), None, coefficients.COGVIDEOX_5B),
        ("cogvideox", cogvideox(48, 16, 2), None, coefficients.COGVIDEOX_15),
        ("cogvideox", cogvideox(48, 32, 2), None, coefficients.COGVIDEOX_15_I2V),
    ],
)
def test_the_polynomial_of_a_model(family: str, config: dict[str, Any], shapes: Any, expected: tuple[float, ...]):
    assert coefficients.coefficients(family, config, shapes) == expected


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("wan", wan(24, 48, out=48), "this Wan model .in_channels 48, 24 heads, without CLIP"),
        ("wan", wan(40, 36), "this Wan model .in_channels 36, 40 heads, without CLIP"),
        ("wan", wan(2), "this Wan model .in_channels 16, 2 heads"),
        ("ltxv", ltxv(28, causal=True), "this LTXV model .28 layers, causal_temporal_positioning True"),
        ("ltxv", ltxv(48, causal=False), "this LTXV model .48 layers, causal_temporal_positioning False"),
        ("cogvideox", cogvideox(48, 48, 2), "this CogVideoX model .48 heads, in_channels 48; published are 2B, 5B"),
        ("QwenImageTransformer2DModel", {}, "QwenImageTransformer2DModel"),
    ],
)
def test_a_model_without_a_published_polynomial_is_refused_by_name(family: str, config: dict[str, Any], named: str):
    with pytest.raises(UnsupportedError, match=rf"TeaCache \(SP\): no TeaCache coefficients .* for {named}"):
        TeaCacheSettings(rel_l1_thresh=0.1).rule(family, config)


# --- decisions on one rank ----------------------------------------------------------------------------------------


def alone(sums: Tensor) -> None:
    """The sum over one rank."""


class Network:
    """Blocks that add given numbers to hidden states [B, 2, 1], and count how often they run."""

    def __init__(self, cache: BlockCache):
        self._cache = cache
        self.runs = 0

    def _block(self, hidden: Tensor, added: Tensor) -> Tensor:
        self.runs += 1
        return hidden + added[:, None, None]

    def __call__(
        self,
        first: list[float],
        rest: float,
        probe: Callable[[], Tensor] = lambda: torch.zeros(1),
        total: Callable[[Tensor], None] = alone,
        **options: Any,
    ) -> Tensor:
        """One pass: the first block adds `first` to the samples, two further ones `rest` each. `probe` gives the
        modulated input."""
        options = {"key": "cond", "inputs": "size", "active": True, "degrees": TWO} | options
        self._cache.begin_step(options["degrees"], options["active"])
        entered = self._cache.enter(options["key"], options["inputs"], total)
        added = [torch.tensor(first), torch.full((len(first),), rest), torch.full((len(first),), rest)]
        start = torch.zeros(len(first), 2, 1)
        if self._cache.after_first:
            start = self._block(start, added.pop(0))
        if entered is not None:
            change = entered.change((start if self._cache.after_first else probe(),))
            if change is not None:
                return (start + change[0])[:, 0, 0]
        hidden = start
        for each in added:
            hidden = self._block(hidden, each)
        if entered is not None:
            entered.computed((hidden - start,))
        return hidden[:, 0, 0]

    @property
    def hits(self) -> int:
        return self._cache.tally.hits


def first_block(threshold: float = 0.1, most: int = 0) -> Network:
    rule = {"kind": "first_block", "threshold": threshold, "most_in_a_row": most}
    return Network(block_cache(rule, CPU))


def test_a_hit_adds_what_the_skipped_blocks_added_last():
    network = first_block()
    assert network([1.0], rest=5.0).item() == 11
    assert network.runs == 3
    assert network([1.05], rest=7.0).item() == pytest.approx(11.05)
    assert network.runs == 4 and network.hits == 1


def test_the_comparison_is_with_the_last_computed_step():
    """Small changes add up: a step is not compared with a skipped one."""
    network = first_block()
    decisions = []
    for value in (1.0, 1.06, 1.12, 1.18, 1.24):
        network([value], rest=1.0)
        decisions.append(network.hits)
    assert decisions == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "changed", [{"key": "uncond"}, {"inputs": "other size"}, {"degrees": Degrees(ring=2)}, {"active": False}]
)
def test_nothing_is_asked_of_the_other_ranks_where_there_is_nothing_to_compare(changed: dict[str, Any]):
    """They would have to know of the comparison, too."""

    def nobody_answers(sums: Tensor) -> None:
        raise AssertionError("a sum over ranks that do not take part")

    network = first_block()
    network([1.0], rest=1.0, total=nobody_answers)
    network([1.0], rest=1.0, total=nobody_answers, **changed)
    assert network.hits == 0


def test_the_sum_over_all_ranks_decides():
    """This rank's tokens have changed by 50 %, those of the others hardly."""

    def total(sums: Tensor) -> None:
        assert sums.shape == (2, 1)
        sums += torch.tensor([[0.01], [100.0]])

    network = first_block()
    network([1.0], rest=1.0, total=total)
    network([1.5], rest=1.0, total=total)
    assert network.hits == 1


def test_each_sample_must_be_below_the_threshold():
    network = first_block()
    network([1.0, 1.0], rest=1.0)
    network([1.0, 1.15], rest=1.0)  # 7.5 % together
    assert network.hits == 0


def test_what_is_no_number_is_computed():
    network = first_block(threshold=1e9)
    for value in (0.0, 0.0, float("nan"), float("nan"), float("inf"), 1.0):
        network([value], rest=1.0)
        assert network.hits == 0


def test_relative_changes_of_bf16_are_summed_in_fp32():
    old = torch.ones(1, 100_000, dtype=torch.bfloat16)
    assert relative_changes((old * 1.5,), (old,), alone) == [0.5]


def test_teacache_adds_up_estimates_of_every_step():
    """To the published arithmetic, with numpy's polynomial; a skipped step is compared with, too."""
    polynomial = coefficients.HUNYUAN_VIDEO
    network = Network(block_cache({"kind": "teacache", "threshold": 0.2, "coefficients": list(polynomial)}, CPU))
    expected, decisions, distance, before = [], [], 0.0, None
    for value in (1.0, 1.1, 1.21, 1.4, 1.45, 1.6, 1.61, 1.9):
        if before is None:
            skip = False
        else:
            distance += float(numpy.poly1d(polynomial)(abs(value - before) / before))
            skip = distance < 0.2
        if not skip:
            distance = 0.0
        before = value
        expected.append(int(skip))
        network([1.0], rest=1.0, probe=lambda value=value: torch.full((1, 3), value))
        decisions.append(network.hits)
    assert decisions == expected
    assert 0 < sum(expected) < len(expected) - 1


def test_a_hit_of_teacache_runs_no_block():
    network = Network(block_cache({"kind": "teacache", "threshold": 1.0, "coefficients": [1.0, 0.0]}, CPU))
    assert network([1.0], rest=5.0, probe=lambda: torch.ones(1, 1)).item() == 11
    assert network([2.0], rest=5.0, probe=lambda: torch.ones(1, 1)).item() == 11
    assert network.runs == 3


def test_a_polynomial_below_zero_is_no_distance():
    """Wan 14B's is −0.3 at 0: it would allow for a large change afterwards."""
    network = Network(block_cache({"kind": "teacache", "threshold": 0.1, "coefficients": [2.0, -0.3]}, CPU))
    for value in (1.0, 1.0, 1.0, 1.3):  # 0, 0, 0.3
        network([1.0], rest=1.0, probe=lambda value=value: torch.full((1, 1), value))
    assert network.hits == 0


# --- the host's part ----------------------------------------------------------------------------------------------


def test_steps_outside_the_window_may_not_skip():
    sampling = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=0.1), first_sigma=0.8, last_sigma=0.3)
    active = [sampling.is_active(sigma) for sigma in (1.0, 0.8, 0.5, 0.3, 0.1)]
    assert active == [False, True, True, False, False]


def test_a_sampling_has_a_number_of_its_own_and_a_new_one_after_a_failure():
    first, second = (CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=0.1)) for _ in range(2))
    numbers = [first.number, second.number]
    first.restart()
    assert len({*numbers, first.number}) == 3


def test_the_report_counts_groups_once_and_time_where_the_others_waited():
    sampling = CachedSampling(FirstBlockCacheSettings(residual_diff_threshold=0.1))

    def result(seconds: float, hits: int, skipped_s: float) -> dict[str, Any]:
        return {"seconds": seconds, "cache": {"hits": hits, "passes": 1, "skipped_s": skipped_s}}

    # One group of two skips, which is of no use while the other computes.
    sampling.count(
        [result(0.1, 1, 0.9), result(0.1, 1, 0.9), result(1.0, 0, 0), result(1.0, 0, 0)], Degrees(cfg=2, ulysses=2)
    )
    sampling.count([result(0.1, 1, 0.9)] * 4, Degrees(cfg=2, ulysses=2))
    report = sampling.report
    assert (report.hits, report.passes) == (3, 4)
    assert report.seconds == pytest.approx(1.1)
    assert report.seconds_saved == pytest.approx(0.9)
    assert str(report) == (
        "First Block Cache (SP): skipped the blocks in 3 of 4 network passes; 1.1 s instead of about 2.0 s (1.82×)"
    )
    assert json.loads(json.dumps(report.to_json()))["hits"] == 3
