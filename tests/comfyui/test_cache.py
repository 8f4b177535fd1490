"""First Block Cache (SP) and TeaCache (SP) in a live server: what is skipped, what is told, what is refused."""

import re

import pytest
import torch

from tests.comfyui.graphs import GraphBuilder, Setting, Swapped, Text, add_sampling, fresh, model_node, sampling_graph
from tests.comfyui.latents import read_latent, relative_difference, sample
from tests.comfyui.model_files import FLUX, WAN, WAN_22_5B
from tests.comfyui.server import ComfyServer, PromptResult

pytestmark = pytest.mark.comfyui

TWO = Swapped(devices="cpu,cpu")
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
TEXT_EVENT = "binary 3"


def first_block(threshold: float = 10.0, most: int = 0):
    return model_node("SPFirstBlockCache", residual_diff_threshold=threshold, max_consecutive_hits=most, **WHOLE)


def teacache(threshold: float = 10.0, **window: float):
    return model_node("SPTeaCache", rel_l1_thresh=threshold, **(WHOLE | window))


EASY = model_node("EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
LAZY = model_node("LazyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
CACHES = {"first_block": first_block, "teacache": teacache}
NAMES = {"first_block": "First Block Cache (SP)", "teacache": "TeaCache (SP)"}
SETTINGS = {
    "cfg_1": Setting(steps=4),
    "cond_and_uncond": Setting(steps=4, cfg=4.0, negative=Text(seed=12)),
    "unequal_prompts": Setting(steps=4, cfg=4.0, chain="cfg_guider", positive=Text(valid=5)),
    "flux": Setting(checkpoint=FLUX, picture=True, steps=4),
}  # fmt: skip


def told(server: ComfyServer, since: int) -> list[tuple[int, int]]:
    """(hits, passes) of each text on a node since then."""
    texts = [event.data["bytes"].decode(errors="replace") for event in server.events(TEXT_EVENT, since=since)]
    found = [re.search(r"\(SP\): skipped the blocks in (\d+) of (\d+) network passes", text) for text in texts]
    return [(int(match[1]), int(match[2])) for match in found if match]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_skipped_and_told(server: ComfyServer, name: str, cache: str) -> None:
    setting = fresh(SETTINGS[name])
    start, logged = server.mark(), len(server.log())
    cached = sample(server, fresh(setting, model_nodes=(CACHES[cache](),)), TWO)
    assert cached.isfinite().all()
    ((hits, passes),) = told(server, start)
    assert 0 < hits < passes and passes % setting.steps == 0
    most = passes * (setting.steps - 1) // setting.steps  # the first step has nothing to skip with
    # TeaCache's polynomial makes any number of a change as large as a random network's, which depends on the seed.
    assert hits == most if cache == "first_block" else hits <= most
    assert f"{NAMES[cache]}: skipped the blocks in {hits} of {passes}" in server.log()[logged:]


@pytest.mark.parametrize("cache", CACHES)
def test_the_next_prompt_starts_with_nothing(server: ComfyServer, cache: str) -> None:
    setting = Setting(steps=3, model_nodes=(CACHES[cache](),))
    start = server.mark()
    for _ in range(2):
        sample(server, fresh(setting), TWO)
    assert told(server, start) == [(2, 3), (2, 3)]


@pytest.mark.parametrize("cache", CACHES)
def test_threshold_zero_is_no_cache(server: ComfyServer, cache: str) -> None:
    setting = fresh(Setting(cfg=4.0))
    plain = sample(server, setting, TWO)
    builder = GraphBuilder()
    node, inputs = CACHES[cache](0.0)
    model = builder.add(node, model=builder.add_loader(setting.checkpoint, TWO), **dict(inputs))
    add_sampling(builder, setting, model)
    assert torch.equal(read_latent(server, server.run(builder.graph)), plain)


def test_the_model_before_the_node_stays_without_a_cache(server: ComfyServer) -> None:
    setting = fresh(Setting())
    plain = sample(server, setting)
    builder = GraphBuilder()
    model = builder.add_loader(setting.checkpoint, TWO)
    node, inputs = first_block()
    add_sampling(builder, setting, builder.add(node, model=model, **dict(inputs)), "cached")
    add_sampling(builder, setting, model, "plain")
    result = server.run(builder.graph)
    assert relative_difference(read_latent(server, result, "plain"), plain) <= 1e-4
    assert relative_difference(read_latent(server, result, "cached"), plain) > 1e-3


def test_a_cache_in_part_of_the_sampling(server: ComfyServer) -> None:
    setting = Setting(steps=8, model_nodes=(teacache(start_percent=0.5),))
    start = server.mark()
    sample(server, fresh(setting), TWO)
    ((hits, passes),) = told(server, start)
    assert passes == 8 and 0 < hits <= 4


def test_hits_in_a_row_are_limited(server: ComfyServer) -> None:
    start = server.mark()
    sample(server, fresh(Setting(steps=6, model_nodes=(first_block(most=1),))), TWO)
    assert told(server, start) == [(3, 6)]


def test_each_context_window_is_a_pass_of_its_own(server: ComfyServer) -> None:
    """Three windows of a video, of one size: the second may not be answered with what the first has left."""
    windows = model_node(
        "WanContextWindowsManual",
        context_length=9,
        context_overlap=4,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        freenoise=True,
        retain_first_frame=False,
        split_conds_to_windows=False,
    )
    text = Text(width=4096)
    setting = Setting(checkpoint=WAN, positive=text, negative=text, length=25, model_nodes=(windows, first_block()))
    start = server.mark()
    sample(server, fresh(setting), TWO)
    assert told(server, start) == [(6, 9)]


# --- refused ------------------------------------------------------------------------------------------------------


def refused(server: ComfyServer, setting: Setting, swapped: Swapped | None) -> PromptResult:
    result = server.run(sampling_graph(fresh(setting), swapped))
    assert result.status == "error"
    sample(server, fresh(Setting()), TWO)  # goes on working
    return result


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ((first_block(), teacache()), ("First Block Cache (SP)", "TeaCache (SP)")),
        ((teacache(), first_block()), ("First Block Cache (SP)", "TeaCache (SP)")),
        ((first_block(), first_block(0.1)), ("First Block Cache (SP)",)),
        ((EASY, first_block()), ("EasyCache", "First Block Cache (SP)")),
        ((first_block(), EASY), ("EasyCache", "First Block Cache (SP)")),
        ((LAZY, teacache()), ("LazyCache", "TeaCache (SP)")),
        ((teacache(), LAZY), ("LazyCache", "TeaCache (SP)")),
    ],
)  # fmt: skip
def test_two_caches_are_refused_by_their_names(server: ComfyServer, nodes: tuple, names: tuple[str, ...]) -> None:
    message = refused(server, Setting(model_nodes=nodes), TWO).message
    assert "cannot be used together with" in message
    assert all(name in message for name in names), message


@pytest.mark.parametrize("cache", CACHES)
def test_a_model_of_another_loader_is_refused(server: ComfyServer, cache: str) -> None:
    result = refused(server, Setting(model_nodes=(CACHES[cache](),)), None)
    assert f"{NAMES[cache]} works on the MODEL of Load Diffusion Model (SP) or Load" in result.message


def test_teacache_refuses_a_model_without_coefficients(server: ComfyServer) -> None:
    result = refused(server, Setting(checkpoint=WAN_22_5B, model_nodes=(teacache(),)), TWO)
    assert "no TeaCache coefficients have been published for this Wan model" in result.message
    assert result.node_type == "SPTeaCache"
