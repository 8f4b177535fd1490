"""Use all GPUs in this workflow, on ComfyUI's own templates with subgraphs, with nodes on the canvas and as HTML.

Each is converted in one of the ways that a user has, runs, is undone and converted back. COMFYUI_TEMPLATES names the
folder of comfyui-workflow-templates-json, unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.browser.frontend import VUE_NODES, FrontEnd
from tests.browser.templates import STAND_INS, family, make_runs_small, write_files
from tests.browser.test_convert import (
    ALL_GPUS,
    COUNTERPARTS,
    ONE_GPU,
    Converter,
    compared,
    levels,
    swapped,
    without_view,
)
from tests.comfyui.fixtures import PACKS, require_pack
from tests.comfyui.installation import Installation
from tests.comfyui.latents import relative_difference
from tests.comfyui.server import ComfyServer
from tests.templates.running import templates_folder

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.browser,
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

TEMPLATES = (
    "flux_fill_inpaint_example",
    "image_anima_base_v1",
    "image_flux2_klein_image_edit_4b_distilled",
    "image_flux2_klein_image_edit_9b_base",
    "image_krea2_turbo_t2i",
    "image_qwen_image_edit_2509",
    "image_z_image_turbo",
    "video_ltx2_3_t2v",
    "video_minimax_h3_t2v",
    "video_wan2_2_14B_i2v",
)
LABEL = "Use all GPUs in this workflow"
KEYS = {"ctrl": True, "alt": True, "shift": False, "key": "g"}
SETTINGS = {"Comfy.Keybinding.NewBindings": [{"commandId": ALL_GPUS, "combo": KEYS}]}
"""As *Settings → Keybinding* stores it."""
ROUNDED = 0.02
"""Relative, where activations are rounded; see `tests/templates/test_proofs.py`."""


@dataclass(frozen=True)
class Templates:
    server: ComfyServer
    workflows: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def templates(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    """A server with the templates' files, tiny."""
    folder = templates_folder()
    workflows = {name: json.loads((folder / f"{name}.json").read_text()) for name in TEMPLATES}
    with ComfyServer(installation, tmp_path_factory.mktemp("comfyui"), PACKS | STAND_INS) as server:
        require_pack(server)
        write_files(installation, server, workflows)
        yield Templates(server, workflows)


def by_the_menu(front_end: FrontEnd) -> None:
    front_end.edit_menu_item(LABEL).click()


def by_a_key(front_end: FrontEnd) -> None:
    """1.49 has no palette of commands: a key is what a command can be given."""
    front_end.page.keyboard.press("Control+Alt+g")


def by_a_nodes_menu(front_end: FrontEnd) -> None:
    """The menu of a subgraph that has a loader in it."""
    page, types = front_end.page, json.dumps(list(COUNTERPARTS))
    place = page.evaluate(
        f"""() => {{
            const holds = (node) => {types}.includes(node.type) || node.subgraph?.nodes.some(holds)
            const node = window.app.rootGraph.nodes.find(holds)
            const canvas = window.app.canvas
            const [x, y] = canvas.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] - 15])
            const frame = canvas.canvas.getBoundingClientRect()
            return [x + frame.left, y + frame.top]
        }}"""
    )
    page.mouse.click(*place, button="right")
    page.get_by_text(LABEL, exact=True).first.click()


def by_the_panel(front_end: FrontEnd) -> None:
    page = front_end.page
    page.get_by_role("button", name="Sequence Parallel").first.click()
    page.locator(".sp-panel").get_by_role("button", name="Use all GPUs").click()
    page.get_by_role("button", name="Sequence Parallel").first.click()


WAYS: tuple[Callable[[FrontEnd], None], ...] = (by_the_menu, by_a_key, by_a_nodes_menu, by_the_panel)
CASES = [
    pytest.param(name, vue, WAYS[(number + vue) % len(WAYS)], id=f"{name}-{'html' if vue else 'canvas'}")
    for number, name in enumerate(TEMPLATES)
    for vue in (False, True)
]


@pytest.mark.parametrize(("name", "vue", "way"), CASES)
def test_a_template(
    browser: Any, templates: Templates, name: str, vue: bool, way: Callable[[FrontEnd], None], tmp_path: Path
) -> None:
    front_end = FrontEnd(browser, templates.server, SETTINGS | {VUE_NODES: vue})
    converter = Converter(front_end)

    def saved() -> str:
        return without_view(converter.saved(), heights=not vue)

    try:
        converter.open(templates.workflows[name])
        assert (front_end.page.locator("[data-node-id]").count() > 0) == vue
        converter.page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        converter.settle()
        native, before, (done, _) = front_end.api_graph(), saved(), converter.history()

        way(front_end)
        front_end.page.wait_for_function("document.body.innerText.includes('Replaced: ')")
        converter.settle()
        converted, after = front_end.api_graph(), saved()
        check_what_changed(json.loads(before), json.loads(after))
        assert compared(converted, native) == swapped(native, COUNTERPARTS)
        assert converter.history() == [done + 1, 0]

        converter.press("Control+z", [done, 1])
        assert saved() == before
        converter.step("Comfy.Redo", [done + 1, 0])
        assert saved() == after
        # Only now: nodes as HTML get their sizes when they are first looked at, which the front end takes for a change.
        take_pictures(front_end, tmp_path / f"{name}-{'html' if vue else 'canvas'}")
        converter.execute(ONE_GPU)
        assert front_end.api_graph() == native

        key = family(native)
        make_runs_small(front_end.page, key)
        results = []
        for command in (None, ALL_GPUS):
            if command:
                converter.execute(command)
            entry = front_end.run(timeout=300)
            assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
            results.append(latents(templates.server, entry))
            used = {node["class_type"] for node in entry["prompt"][2].values()}
            assert bool(used & set(COUNTERPARTS.values())) == (command == ALL_GPUS), used
        assert len(templates.server.workers()) == 2
        off = {node: relative_difference(results[1][node], latent) for node, latent in results[0].items()}
        rounded = any("int8" in str(node["inputs"].get("unet_name")) for node in native.values())
        assert off and max(off.values()) <= (ROUNDED if rounded else 1e-4), off
        assert front_end.own_errors() == []
    finally:
        front_end.close()


def latents(server: ComfyServer, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the history says that a prompt has saved, by node."""
    found = {}
    for node, output in entry["outputs"].items():
        for file in output.get("latents", []):
            path = server.base / "output" / file["subfolder"] / file["filename"]
            found[node] = load_file(path)["latent_tensor"].float()
    return found


def take_pictures(front_end: FrontEnd, path: Path) -> None:
    """Of the graph, and of each subgraph that has an SP Config; where that is, no other node may be."""
    page = front_end.page
    page.screenshot(path=path.with_suffix(".png"))
    hosts = page.evaluate(
        """() => {
            const found = new Map()
            const walk = (graph) => {
                for (const node of graph.nodes.filter((node) => node.subgraph)) {
                    if (node.subgraph.nodes.some(({ type }) => type === 'SPConfig')) found.set(node.subgraph.id, node)
                    walk(node.subgraph)
                }
            }
            walk(window.app.rootGraph)
            window.spTestHosts = [...found.values()]
            return found.size
        }"""
    )
    assert hosts
    for number in range(hosts):
        page.evaluate(
            "(i) => window.app.canvas.openSubgraph(window.spTestHosts[i].subgraph, window.spTestHosts[i])", number
        )
        front_end.screenshot(path.with_name(f"{path.name}-{number}.png"))
        crossing = page.evaluate(
            """() => {
                const { nodes, inputNode, outputNode } = window.app.canvas.graph
                const [config] = nodes.filter(({ type }) => type === 'SPConfig')
                const [x, y, width, height] = config.boundingRect
                const crosses = ({ boundingRect: [a, b, w, h] }) =>
                    a < x + width && x < a + w && b < y + height && y < b + h
                const others = [...nodes.filter((node) => node !== config), inputNode, outputNode]
                return others.filter(crosses).map(({ type, constructor }) => type ?? constructor.name)
            }"""
        )
        assert not crossing, f"SP Config lies over {crossing}"
    page.evaluate("window.app.canvas.setGraph(window.app.rootGraph)")
    front_end.settle()


def check_what_changed(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Loaders have become the pack's, each level with one has got an SP Config, and nothing else has changed."""
    swaps = 0
    for old, new in zip(levels(before), levels(after), strict=True):
        nodes = {node["id"]: node for node in new["nodes"]}
        loaders = [node for node in old["nodes"] if node["type"] in COUNTERPARTS]
        swaps += len(loaders)
        added = [node for id, node in nodes.items() if id not in {node["id"] for node in old["nodes"]}]
        assert [node["type"] for node in added] == ["SPConfig"] * bool(loaders)
        for node in old["nodes"]:
            check_node(node, nodes[node["id"]])
        ours = {link for node in added for output in node["outputs"] for link in output["links"] or []}
        assert len(ours) == len(loaders)
        assert links(old) == {id: link for id, link in links(new).items() if id not in ours}
        for part in ("name", "groups", "inputs", "outputs", "inputNode", "outputNode", "widgets"):
            assert new.get(part) == old.get(part), part
    assert swaps, "there is no loader"


def check_node(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A node is what it was, or the counterpart of what it was."""
    if old["type"] not in COUNTERPARTS:
        assert new | {"order": 0} == old | {"order": 0}  # the order in which nodes run
        return
    assert new["type"] == COUNTERPARTS[old["type"]]
    for part in ("pos", "title", "mode", "flags", "color", "bgcolor", "outputs", "widgets_values"):
        assert new.get(part) == old.get(part), part
    assert new["size"][0] == old["size"][0]
    inputs = {put["name"]: put for put in new["inputs"]}
    assert inputs.pop("sp_config")["link"] is not None
    assert {name: put["link"] for name, put in inputs.items()} == {put["name"]: put["link"] for put in old["inputs"]}


def links(graph: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
    """Id → origin, its output, target, and the target's input by name, as far as it has one."""
    names = {
        (node["id"], slot): put["name"] for node in graph["nodes"] for slot, put in enumerate(node.get("inputs") or [])
    }
    found = {}
    for link in graph.get("links") or []:
        if isinstance(link, dict):
            link = [link[part] for part in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
        id, origin, output, target, slot, kind = link
        found[id] = (origin, output, target, names.get((target, slot), slot), kind)
    return found
