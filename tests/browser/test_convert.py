"""Use all GPUs in this workflow, and back, as a user meets it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.browser.frontend import FrontEnd
from tests.browser.test_panel import Panel
from tests.comfyui.graphs import Setting, sampling_graph
from tests.comfyui.installation import Installation
from tests.comfyui.latents import relative_difference
from tests.comfyui.model_files import FLUX
from tests.comfyui.server import Graph

pytestmark = [pytest.mark.comfyui, pytest.mark.browser, pytest.mark.slow]

OWN = sorted((Path(__file__).parent / "subgraphs").glob("*.json"))
TEMPLATES = (  # of ComfyUI's package, all with their loaders in subgraphs
    "audio_ace_step_1_5_split_llm",
    "flux_depth_lora_example",
    "image_flux2_klein_text_to_image",
    "image_krea2_turbo_t2i",
    "image_netayume_lumina_t2i",
    "image_qwen_image_edit_2509",
    "image_z_image_turbo",
    "video_ltx2_3_t2v",
    "video_minimax_h3_t2v",
    "video_wan2_2_14B_i2v",
)
ALL_GPUS, ONE_GPU = "SequenceParallel.UseAllGPUs", "SequenceParallel.UseOneGPU"
COUNTERPARTS = {"UNETLoader": "SPLoadDiffusionModel", "CheckpointLoaderSimple": "SPLoadCheckpoint"}
DECODERS = dict.fromkeys(("VAEDecode", "VAEDecodeTiled"), "SPVAEDecode")
SETTING = "SequenceParallel.Workflow.ReplaceVAEDecode"

_HISTORY = """
() => {
    const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker
    return [tracker.undoQueue.length, tracker.redoQueue.length]
}
"""


@pytest.fixture(scope="session")
def templates(installation: Installation) -> Path:
    """The folder of ComfyUI's own templates; they are not ours to keep copies of."""
    code = "import comfyui_workflow_templates_json as found; print(found.__path__[0])"
    done = subprocess.run([installation.python, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("ComfyUI's Python has no comfyui_workflow_templates_json")
    return Path(done.stdout.strip()) / "templates"


class Converter:
    """A page whose workflow is converted."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.page = front_end.page

    def open(self, workflow: dict[str, Any]) -> None:
        """Opens what *Save* writes of a workflow, until opening it changes nothing.

        In Nodes 2.0 nodes get the height of what is in them, one or two openings later.
        """
        self.front_end.load_workflow(workflow)
        for _ in range(5):
            saved = self.saved()
            self.front_end.load_workflow(json.loads(saved))
            if without_view(self.saved()) == without_view(saved):
                break
        else:
            pytest.fail("opening this workflow changes it each time")
        self.settle()

    def settle(self) -> None:
        """As after any key, the front end notes what has changed."""
        self.front_end.settle()
        self.page.keyboard.down("Shift")
        self.page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))")
        self.page.keyboard.up("Shift")
        self.front_end.settle()

    def saved(self) -> str:
        return self.page.evaluate("JSON.stringify((window.app.rootGraph ?? window.app.graph).serialize())")

    def execute(self, command: str) -> None:
        self.page.evaluate("(id) => window.app.extensionManager.command.execute(id)", command)
        self.settle()

    def press(self, keys: str, expected: list[int]) -> None:
        """Presses keys that lead to these lengths of what can be undone and redone."""
        self.page.keyboard.press(keys)
        self._wait_for(expected)

    def step(self, command: str, expected: list[int]) -> None:
        """Undo or Redo, with nothing in between.

        After an undo of its own, 1.58 takes types of Switch nodes that follow a little later for the user's change, as
        soon as a key or a button is let go; then there is no redo.
        """
        self.page.evaluate("(id) => window.app.extensionManager.command.execute(id)", command)
        self._wait_for(expected)

    def _wait_for(self, expected: list[int]) -> None:
        self.page.wait_for_function(f"(expected) => String(({_HISTORY})()) === String(expected)", arg=expected)
        self.front_end.settle()

    def history(self) -> list[int]:
        return self.page.evaluate(_HISTORY)

    def toasts(self) -> str:
        shown = self.page.locator(".p-toast-message, li[role='alert'], li[role='status']")
        return "\n".join(shown.all_inner_texts())


@pytest.fixture
def converter(front_end: FrontEnd) -> Converter:
    return Converter(front_end)


def swapped(native: Graph, counterparts: dict[str, str]) -> Graph:
    """An API graph as the conversion should make it, without SP Config, and with what differs by design left out."""
    expected = deepcopy(native)
    for node in expected.values():
        node["class_type"] = counterparts.get(node["class_type"], node["class_type"])
        node.pop("_meta")
    return expected


def compared(converted: Graph, native: Graph) -> Graph:
    """The converted graph with what `swapped` leaves out taken away."""
    graph = deepcopy(converted)
    configs = [id for id, node in graph.items() if node["class_type"] == "SPConfig" and id not in native]
    for id in configs:
        del graph[id]
    for id, node in graph.items():
        node.pop("_meta")
        config = node["inputs"].pop("sp_config", None)
        if config is not None:
            assert config[0] in configs, node
            assert config[0].rpartition(":")[0] == id.rpartition(":")[0], "the config is on another level"
        if node["class_type"] == "SPVAEDecode" and native[id]["class_type"] == "VAEDecode":
            node["inputs"] = {name: node["inputs"][name] for name in native[id]["inputs"]}
    return graph


def check_both_ways(converter: Converter, workflow: dict[str, Any], picture: Path) -> None:
    """Converts, undoes, redoes and converts back; each step is what it should be."""
    front_end = converter.front_end
    converter.open(workflow)
    native, before, (done, _) = front_end.api_graph(), converter.saved(), converter.history()
    missing = front_end.missing_nodes()  # of online services, and of newer versions of ComfyUI
    converter.execute(ALL_GPUS)
    converted, after = front_end.api_graph(), converter.saved()
    front_end.screenshot(picture)
    assert front_end.missing_nodes() == missing
    assert not {node["class_type"] for node in converted.values()} & COUNTERPARTS.keys()
    assert compared(converted, native) == swapped(native, COUNTERPARTS)
    assert converter.history() == [done + 1, 0]
    converter.step("Comfy.Undo", [done, 1])
    assert without_view(converter.saved()) == without_view(before)
    converter.step("Comfy.Redo", [done + 1, 0])
    assert without_view(converter.saved()) == without_view(after)
    converter.execute(ONE_GPU)
    assert front_end.api_graph() == native
    assert front_end.own_errors() == []


def without_view(saved: str, *, heights: bool = True) -> str:
    """The text of a saved workflow without where the window shows it, which the screenshot has moved.

    Args:
        saved: what *Save* writes.
        heights: of nodes too. In Nodes 2.0 the front end's own Undo and Redo change some.
    """
    workflow = json.loads(saved)
    workflow["extra"].pop("ds", None)
    if not heights:
        for graph in levels(workflow):
            for node in graph["nodes"]:
                node["size"] = node["size"][:1]
    return json.dumps(workflow)


def levels(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The graph and all definitions of subgraphs."""
    yield workflow
    for subgraph in workflow.get("definitions", {}).get("subgraphs", []):
        yield from levels(subgraph)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_workflows_with_subgraphs(converter: Converter, path: Path, tmp_path: Path) -> None:
    check_both_ways(converter, json.loads(path.read_text()), tmp_path / f"{path.stem}.png")


@pytest.mark.parametrize("name", TEMPLATES)
def test_comfyui_templates(converter: Converter, templates: Path, name: str, tmp_path: Path) -> None:
    path = templates / f"{name}.json"
    if not path.exists():
        pytest.skip(f"these templates have no {name}")
    check_both_ways(converter, json.loads(path.read_text()), tmp_path / f"{name}.png")


def test_undo_gives_the_saved_file_to_the_byte(converter: Converter) -> None:
    for path in OWN:
        converter.open(json.loads(path.read_text()))
        before, (done, _) = converter.saved(), converter.history()
        converter.execute(ALL_GPUS)
        assert converter.saved() != before
        converter.press("Control+z", [done, 1])
        assert converter.saved() == before


def test_inside_a_subgraph_its_view_stays(converter: Converter) -> None:
    converter.open(json.loads(OWN[0].read_text()))
    opened = "window.app.canvas.graph === window.app.rootGraph ? '' : window.app.canvas.graph.id"
    converter.page.evaluate(
        """() => {
            const host = window.app.rootGraph.nodes.find((node) => node.isSubgraphNode?.())
            window.app.canvas.openSubgraph(host.subgraph, host)
        }"""
    )
    inside = converter.page.evaluate(opened)
    assert inside
    for command in (ALL_GPUS, "Comfy.Undo", "Comfy.Redo", ONE_GPU):
        converter.execute(command)
        assert converter.page.evaluate(opened) == inside, command
        shown = converter.page.evaluate("window.app.canvas.graph.nodes.map((node) => node.type)")
        assert ("SPLoadDiffusionModel" in shown) == (command in (ALL_GPUS, "Comfy.Redo")), command


def test_a_converted_subgraph_runs(converter: Converter) -> None:
    """The same picture as ComfyUI's own loader gives, by two workers."""
    front_end = converter.front_end
    converter.open(json.loads(next(path for path in OWN if path.stem == "picture").read_text()))
    latents = []
    for command in (None, ALL_GPUS):
        if command:
            converter.execute(command)
            converter.page.evaluate(
                """() => {
                    for (const { nodes } of window.app.rootGraph.subgraphs.values())
                        for (const node of nodes.filter(({ type }) => type === 'SPConfig'))
                            node.widgets.find(({ name }) => name === 'devices').value = 'cpu,cpu'
                }"""
            )
        entry = front_end.run(timeout=240)
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
        (output,) = (file for output in entry["outputs"].values() for file in output.get("latents", []))
        latents.append(load_file(front_end.server.base / "output" / output["subfolder"] / output["filename"]))
    native, parallel = (each["latent_tensor"] for each in latents)
    assert relative_difference(parallel, native) <= 1e-4
    assert len(front_end.server.workers()) == 2
    assert front_end.own_errors() == []


def test_a_decoder_is_replaced_if_the_setting_says_so(converter: Converter) -> None:
    graph: Graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": FLUX, "weight_dtype": "default"}},
        "2": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "3": {"class_type": "SPTestRandomVAE", "inputs": {"kind": "tiny_flux"}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["3", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    front_end = converter.front_end
    front_end.load_graph(graph)
    native = front_end.api_graph()
    set_to = f"(value) => window.app.extensionManager.setting.set('{SETTING}', value)"
    for value in (False, True):
        converter.page.evaluate(set_to, value)
        try:
            converter.execute(ALL_GPUS)
        finally:
            converter.page.evaluate(set_to, False)
        converted = front_end.api_graph()
        assert compared(converted, native) == swapped(native, COUNTERPARTS | (DECODERS if value else {}))
        converter.execute(ONE_GPU)
        assert front_end.api_graph() == native


def test_it_says_what_it_did_and_what_it_left(converter: Converter) -> None:
    workflow = json.loads(next(path for path in OWN if path.stem == "picture").read_text())
    loader = workflow["definitions"]["subgraphs"][0]["nodes"][0]
    assert loader["type"] == "UNETLoader"
    outputs = [{"name": "MODEL", "type": "MODEL", "links": None}]
    workflow["nodes"].append(
        {**loader, "id": 90, "type": "NunchakuFluxDiTLoader", "inputs": [], "outputs": outputs, "title": "Another"}
    )
    workflow["last_node_id"] = 90
    converter.open(workflow)
    converter.execute(ALL_GPUS)
    said = converter.toasts()
    assert "Replaced: Load Diffusion Model → Load Diffusion Model (SP)." in said, said
    assert "Added: SP Config." in said, said
    assert "Left as it is: NunchakuFluxDiTLoader (no node does the same)." in said, said
    before = converter.history()
    converter.execute(ALL_GPUS)
    assert "There is nothing to replace in this workflow." in converter.toasts()
    assert converter.history() == before


def test_where_a_user_finds_it(converter: Converter, tmp_path: Path) -> None:
    front_end, page = converter.front_end, converter.page
    front_end.load_graph(sampling_graph(Setting(checkpoint=FLUX, picture=True)))
    label = "Use all GPUs in this workflow"

    item = front_end.edit_menu_item(label)
    page.screenshot(path=tmp_path / "menu.png")
    item.click()
    page.wait_for_function("window.app.graph.nodes.some((node) => node.type === 'SPLoadDiffusionModel')")

    menu = "(type) => window.app.collectNodeMenuItems(window.app.graph.nodes.find((node) => node.type === type))"
    texts = f"(type) => ({menu})(type).filter((item) => item).map((item) => item.content)"
    assert page.evaluate(texts, "SPLoadDiffusionModel") == ["Use one GPU again in this workflow"]
    assert page.evaluate(texts, "KSampler") == []

    panel = Panel(front_end)
    panel.page.screenshot(path=tmp_path / "panel.png")
    panel.press("Use one GPU again")
    page.wait_for_function("window.app.graph.nodes.some((node) => node.type === 'UNETLoader')")
    assert page.evaluate(texts, "UNETLoader") == [label]
    panel.press("Use all GPUs")
    page.wait_for_function("window.app.graph.nodes.some((node) => node.type === 'SPLoadDiffusionModel')")
    assert front_end.own_errors() == []
