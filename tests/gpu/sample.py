"""A sample of the distributed suite, one test or two for each feature: `pytest -p tests.gpu.sample tests/distributed`.

`SEQUENCE_PARALLEL_SAMPLE=toy` takes the features that are worth their time on two CPU ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

VARIABLE = "SEQUENCE_PARALLEL_SAMPLE"
TWO, THREE, FOUR = "cpu,cpu", "cpu*3,cpu,cpu", "cpu,cpu,cpu,cpu"


@dataclass(frozen=True)
class Feature:
    """Tests by their functions, and by the parameters that they must have."""

    name: str
    function: str
    """Module and function."""
    parameters: dict[str, Any] = field(default_factory=dict)
    toy: bool = False

    def has(self, item: pytest.Item) -> bool:
        module, _, function = self.function.partition("::")
        if item.path.name != f"{module}.py" or getattr(item, "originalname", item.name) != function:
            return False
        given = getattr(getattr(item, "callspec", None), "params", {})
        return all(name in given and given[name] == value for name, value in self.parameters.items())


MANY, ANY = (
    "test_model::test_many_workers_give_what_one_gives",
    "test_model::test_any_degrees_give_what_one_worker_gives",
)
SHARD, OFFLOAD = {"weights": "shard"}, {"weights": "offload"}

FEATURES = (  # the most important ones first: time may run out
    Feature("even", MANY, {"name": "wan", "devices": TWO}, toy=True),
    Feature("padded text", MANY, {"name": "padded_text", "devices": TWO}),
    Feature("uneven, three ranks", MANY, {"name": "odd_tokens", "devices": THREE}),
    Feature("a rank without heads", MANY, {"name": "wan_three_heads", "devices": FOUR}),
    Feature("Ulysses, four ranks", MANY, {"name": "flux_odd_tokens", "devices": FOUR}),
    Feature("a batch, three ranks", MANY, {"name": "cogvideox_i2v_batch_2", "devices": THREE}),
    Feature("ring", ANY, {"name": "odd_tokens", "devices": TWO, "degrees": {"ring_degree": 2}}, toy=True),
    Feature("ring of three", ANY, {"name": "odd_tokens", "devices": THREE}),
    Feature("Ulysses and ring", ANY, {"name": "flux_controlnet", "devices": FOUR, "degrees": {"ring_degree": 2}}),
    Feature("dp", ANY, {"name": "wan_first_and_last_frame", "devices": FOUR, "degrees": {"dp_degree": 2}}),
    Feature("cfg", "test_model::test_cond_and_uncond_side_by_side", {"devices": TWO}),
    Feature("cfg and Ulysses", "test_model::test_cond_and_uncond_side_by_side", {"devices": FOUR}),
    Feature("bit for bit: shard, offload", "test_placement::test_every_mode_gives_the_same"),
    Feature("shard and ring", "test_placement::test_every_plan", {"devices": FOUR} | SHARD),
    Feature("offload and dp", "test_placement::test_every_plan", {"devices": FOUR} | OFFLOAD),
    Feature("caches: skipped steps", "test_placement::test_steps_that_skip_blocks"),
    Feature("caches: one decision", "test_cache::test_ranks_on_both_sides_of_the_threshold_decide_alike"),
    Feature("sampling", "test_sampling::test_the_same_result_after_one_message", {"name": "guided", "devices": TWO}),
    Feature(
        "FP8 weights",
        "test_fp8::test_weight_only_is_within_5_percent_and_alike_on_any_number_of_ranks",
        {"name": "HunyuanVideoTransformer3DModel"},
    ),
    Feature("LoRA", "test_weights::test_each_replacement_starts_from_the_file"),
    Feature(
        "diffusers' own results", "test_model::test_one_worker_gives_what_diffusers_gives", {"name": "padded_text"}
    ),
    Feature("attention, every shape", "test_attention::test_each_rank_gets_its_tokens_of_the_whole_attention"),
    Feature("sharded blocks, one ahead", "test_placement::test_blocks_are_gathered_one_by_one_or_one_ahead"),
    Feature("gradients", "test_gradients::test_gradients_averaged_over_ranks_are_those_of_one"),
    Feature("exposed communication", "test_exposed::test_who_comes_first_waits_and_who_comes_late_does_not"),
)


def chosen(features: Iterable[Feature] = FEATURES) -> list[Feature]:
    toy = os.environ.get(VARIABLE) == "toy"
    return [feature for feature in features if feature.toy or not toy]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of the features, in the features' order.

    Raises:
        pytest.UsageError: a feature has no test, as after somebody has renamed it.
    """
    kept: dict[str, pytest.Item] = {}
    for feature in chosen():
        tests = [item for item in items if feature.has(item)]
        if not tests:
            raise pytest.UsageError(f"no test for the feature {feature.name!r}: {feature.function}{feature.parameters}")
        for item in tests:
            item.user_properties.append(("feature", feature.name))
            kept[item.nodeid] = item
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = kept.values()
