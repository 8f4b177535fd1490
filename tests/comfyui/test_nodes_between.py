"""Each node of a table between the loader and the sampler: as with ComfyUI's own loader, or refused by its name."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
from torch import Tensor

from tests.comfyui.graphs import Swapped, model_node, sampling_graph
from tests.comfyui.installation import REPOSITORY
from tests.comfyui.latents import read_latent, relative_difference
from tests.comfyui.nodes_between import CASES, WAN, WHOLE, Case, graph, with_seedvr2
from tests.comfyui.server import ComfyServer

pytestmark = pytest.mark.comfyui

ONE, TWO, RING = Swapped("cpu"), Swapped("cpu,cpu"), Swapped("cpu,cpu", ring_degree=2)
UNUSED = Swapped(devices="cpu*5,cpu*3")
"""Nothing else has workers of these speeds."""
HELP = REPOSITORY / "js/docs/SPLoadDiffusionModel.md"

WORK = [case for case in CASES if not case.says]
REFUSED = [case for case in CASES if case.says]


def named(cases: list[Case], keep: int = 1) -> list[object]:
    """One in `keep` is in CI, the others are extended."""
    return [
        pytest.param(
            case,
            id=f"{case.node}-{case.setting.checkpoint.partition('.')[0]}",
            marks=() if i % keep == 0 else pytest.mark.extended,
        )
        for i, case in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def natives() -> dict[str, Tensor]:
    return {}


@pytest.fixture
def native(server: ComfyServer, natives: dict[str, Tensor]):
    """The latent with ComfyUI's own loader, sampled once."""

    def get(case: Case, *, without: bool = False) -> Tensor:
        made = graph(case, None, without=without)
        if repr(made) not in natives:
            natives[repr(made)] = read_latent(server, server.run(made))
        return natives[repr(made)]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", named(WORK, keep=2))
def test_it_works_on_two_workers(server: ComfyServer, native, case: Case) -> None:
    expected = native(case)
    if not case.required:
        effect = relative_difference(expected, native(case, without=True))
        assert effect <= 1e-5 if case.no_effect else effect > 1e-4, "not what the table says, with ComfyUI's own loader"
    latent = read_latent(server, server.run(graph(case, TWO)))
    assert relative_difference(latent, expected) <= case.tolerance


@pytest.mark.parametrize("case", named(REFUSED))
def test_it_is_refused_by_name(server: ComfyServer, case: Case) -> None:
    workers = set(server.workers())
    result = server.run(graph(case, UNUSED))
    assert result.status == "error", f"the prompt ended with {result.status}: {result.message}"
    name = () if "Bypass" in case.node else (case.node,)  # it shares what it calls with others
    assert not [each for each in (*name, *case.says) if not re.search(each, result.message)], result.message
    assert not set(server.workers()) - workers, "processes were started for a prompt that cannot run"


def test_the_help_page_lists_them() -> None:
    _, _, section = HELP.read_text().partition("## Nodes between this node and the sampler\n")
    work, _, refused = section.partition("\n## ")[0].partition("Refused")
    for text, cases in ((work, WORK), (refused, REFUSED)):
        named = {case.node for case in cases if not case.node.startswith("SPTest")}
        assert set(re.findall(r"`([^`]+)`", text)) == named


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [RING, Swapped(weights="shard"), Swapped(weights="offload")], ids=str)
def test_skipped_blocks_under_other_splits(server: ComfyServer, native, swapped: Swapped) -> None:
    case = next(case for case in WORK if case.node == "SkipLayerGuidanceDiT" and case.setting is WAN)
    assert relative_difference(read_latent(server, server.run(graph(case, swapped))), native(case)) <= 1e-5


@pytest.mark.slow
def test_a_cache_and_skipped_blocks_are_refused_together(server: ComfyServer) -> None:
    cache = model_node("SPFirstBlockCache", residual_diff_threshold=0.1, max_consecutive_hits=2, **WHOLE)
    skip = model_node("SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="", **WHOLE)
    result = server.run(sampling_graph(replace(WAN, model_nodes=(cache, skip)), TWO))
    assert result.status == "error"
    assert "SkipLayerGuidanceDiTSimple together with a cache" in result.message, result.message


@pytest.mark.slow
def test_attention_without_a_log_sum_exp_is_refused_in_a_ring(server: ComfyServer) -> None:
    (case,) = (case for case in CASES if case.node == "SPTestAttentionBackend")
    result = server.run(graph(case, RING))
    assert result.status == "error"
    assert "'split'" in result.message and "ring_degree" in result.message, result.message
    chosen = server.run(graph(case, Swapped("cpu,cpu", attention="sdpa")))
    assert chosen.status == "error" and "set attention to auto" in chosen.message, chosen.message
    assert server.run(graph(case, TWO)).status == "success", "the workers do not work any more"


def test_one_prompt_as_both_of_seedvr2_is_refused(server: ComfyServer) -> None:
    (case,) = (case for case in CASES if case.node == "SeedVR2Conditioning")
    result = server.run(graph(replace(case, add=partial(with_seedvr2, negative=0)), TWO))
    assert result.status == "error"
    assert "one prompt as positive and as negative" in result.message and "cfg" in result.message, result.message


# Last, since one worker is another group, which takes seconds to start.


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", named([case for case in WORK if "Skip" in case.node or "Attention" in case.node], keep=2)
)
def test_it_works_on_one_worker(server: ComfyServer, native, case: Case) -> None:
    """As close as without the node: rounding of products depends on where in memory the file is mapped."""
    latent = read_latent(server, server.run(graph(case, ONE)))
    assert relative_difference(latent, native(case)) <= 2e-6
