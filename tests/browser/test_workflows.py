"""The bundled workflows in ComfyUI's front end."""

import json
import re
from pathlib import Path

import pytest

from tests.browser.frontend import FrontEnd
from tests.comfyui.graphs import Setting, sampling_graph
from tests.comfyui.installation import PACK_NAME, REPOSITORY
from tests.comfyui.model_files import COGVIDEOX, FLUX, HUNYUAN_15, TINY, WAN
from tests.comfyui.server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
TEXT_TO_VIDEO = "hunyuan_video_t2v"


def read_workflow(name: str) -> dict:
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text())


def test_a_native_graph_runs(native_front_end: FrontEnd, tmp_path: Path) -> None:
    """The helpers themselves: open, recognise missing nodes, save and open again, run."""
    front_end = native_front_end
    front_end.load_graph(sampling_graph(Setting(seed=71)))
    assert front_end.missing_nodes() == []
    workflow = front_end.serialize()
    broken = json.loads(json.dumps(workflow))
    broken["nodes"][0]["type"] = "NoSuchNode"
    front_end.load_workflow(broken)
    assert front_end.missing_nodes() == ["NoSuchNode"]
    assert "Missing node" in front_end.text()
    front_end.load_workflow(workflow)
    assert front_end.run()["status"]["status_str"] == "success"
    assert front_end.screenshot(tmp_path / "native.png").stat().st_size > 10_000


def test_templates_are_listed(server: ComfyServer) -> None:
    listed = server.get("/api/workflow_templates").get(PACK_NAME, [])
    assert TEXT_TO_VIDEO in listed
    assert set(listed) == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_template_opens_from_the_dialog(front_end: FrontEnd, name: str, tmp_path: Path) -> None:
    front_end.open_template(PACK_NAME, name)
    assert front_end.missing_nodes() == []
    expected = sorted(node["type"] for node in read_workflow(name)["nodes"])
    assert sorted(front_end.node_types()) == expected
    front_end.screenshot(tmp_path / f"{name}.png")


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_widgets_keep_their_values(front_end: FrontEnd, name: str) -> None:
    """Inputs that move or change break saved workflows: each value must still be one that the node allows."""
    front_end.load_workflow(read_workflow(name))
    for node in front_end.api_graph().values():
        if node["class_type"].startswith("SP"):
            _check_inputs(front_end.server, node["class_type"], node["inputs"])


def _check_inputs(server: ComfyServer, node_type: str, inputs: dict) -> None:
    known = server.get(f"/object_info/{node_type}")[node_type]["input"]
    for name, (kind, *rest) in (known.get("required", {}) | known.get("optional", {})).items():
        if name not in inputs or isinstance(inputs[name], list):
            continue
        place, value, limits = f"{node_type}.{name}", inputs[name], rest[0] if rest else {}
        options = kind if isinstance(kind, list) else limits.get("options", [])
        if options and name != "unet_name":
            assert value in options, place
        elif kind == "INT" or kind == "FLOAT":
            assert isinstance(value, int | float), place
            assert limits["min"] <= value <= limits["max"], place
        elif kind == "BOOLEAN":
            assert isinstance(value, bool), place
        elif kind == "STRING":
            assert isinstance(value, str), place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpoint", "text_width"),
    [
        (TEXT_TO_VIDEO, TINY, 64),
        ("wan_t2v", WAN, 4096),
        ("flux_t2i", FLUX, 64),
        ("hunyuan_video_15_t2v", HUNYUAN_15, 64),
        ("cogvideox_t2v", COGVIDEOX, 64),
    ],
)
def test_a_template_runs(front_end: FrontEnd, name: str, checkpoint: str, text_width: int, tmp_path: Path) -> None:
    front_end.load_workflow(read_workflow(name))
    front_end.replace_large_models(width=64, height=48, length=5, text_width=text_width)
    front_end.set_widget("SPLoadDiffusionModel", "unet_name", checkpoint)
    front_end.set_widget("SPConfig", "devices", "cpu,cpu")
    entry = front_end.run()
    front_end.screenshot(tmp_path / "finished.png")
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert any("latents" in output for output in entry["outputs"].values())
    ours = [error for error in front_end.errors if PACK_NAME in error]
    assert not ours, ours


def test_a_wrong_setting_is_shown_at_once(front_end: FrontEnd, tmp_path: Path) -> None:
    front_end.load_workflow(read_workflow(TEXT_TO_VIDEO))
    front_end.replace_large_models(width=64, height=48, length=5)
    front_end.set_widget("SPLoadDiffusionModel", "unet_name", TINY)
    front_end.set_widget("SPConfig", "devices", "tpu")
    assert not front_end.queue()
    details = front_end.error_details()
    front_end.screenshot(tmp_path / "refused.png")
    assert re.search(r"devices\b.*\btpu\b", details), details
