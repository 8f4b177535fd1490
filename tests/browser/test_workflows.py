"""The bundled workflows in ComfyUI's front end."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.browser.frontend import FrontEnd
from tests.comfyui.graphs import Setting, sampling_graph
from tests.comfyui.installation import PACK_NAME, REPOSITORY
from tests.comfyui.latents import relative_difference
from tests.comfyui.model_files import (
    COGVIDEOX,
    COGVIDEOX_I2V,
    FLUX,
    FLUX2,
    HUNYUAN_15,
    LTXV,
    MOCHI,
    QWEN_IMAGE,
    TINY,
    WAN,
)
from tests.comfyui.server import ComfyServer
from tests.comfyui.test_bundled_templates import FAMILIES

pytestmark = [pytest.mark.comfyui, pytest.mark.browser, pytest.mark.slow]

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
TEXT_TO_VIDEO = "hunyuan_video_t2v"
COMPARISON = "native_against_sp"


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


def test_saving_a_template_writes_its_file_again(front_end: FrontEnd) -> None:
    """Who opens one and saves it has changed nothing.

    But for the names of slots in the user's language: the front end takes them from the nodes, whatever the file says.
    """
    found = []
    for path in WORKFLOWS:
        workflow = read_workflow(path.stem)
        front_end.load_workflow(workflow, wait=False)
        saved = front_end.serialize()
        changed = differences(without_translations(workflow), without_translations(saved))
        found += [f"{path.name}{change}" for change in changed]

        for slot in slots(workflow):
            slot["localized_name"] = "in another language"
        front_end.load_workflow(workflow, wait=False)
        assert list(differences(saved, front_end.serialize())) == [], "names in the file matter: compare them, too"
    assert not found, "\n".join([*found, "run tests/browser/saved_workflows.py"])


def slots(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for node in workflow["nodes"]:
        yield from (*node["inputs"], *node["outputs"])


def without_translations(workflow: dict[str, Any]) -> dict[str, Any]:
    copied = deepcopy(workflow)
    for slot in slots(copied):
        slot.pop("localized_name", None)
    return copied


def differences(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    """Every field that is missing, new or changed: true is not 1, and 1 is not 1.0."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            yield from differences(expected.get(name, "nothing"), found.get(name, "nothing"), f"{place}.{name}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{place}[{i}]")
    elif json.dumps(expected) != json.dumps(found):
        yield f"{place}: {expected!r} became {found!r}"


def test_widgets_keep_their_values(front_end: FrontEnd) -> None:
    """Inputs that move or change break saved workflows: each value must still be one that the node allows."""
    for path in WORKFLOWS:
        front_end.load_workflow(read_workflow(path.stem), wait=False)
        for node in front_end.api_graph().values():
            if node["class_type"].startswith("SP"):
                _check_inputs(front_end.server, path.stem, node["class_type"], node["inputs"])


def _check_inputs(server: ComfyServer, workflow: str, node_type: str, inputs: dict) -> None:
    known = server.get(f"/object_info/{node_type}")[node_type]["input"]
    for name, (kind, *rest) in (known.get("required", {}) | known.get("optional", {})).items():
        if name not in inputs or isinstance(inputs[name], list):
            continue
        place, value, limits = f"{workflow}: {node_type}.{name}", inputs[name], rest[0] if rest else {}
        options = kind if isinstance(kind, list) else limits.get("options", [])
        if options and name not in ("unet_name", "ckpt_name"):
            assert value in options, place
        elif kind == "INT" or kind == "FLOAT":
            assert isinstance(value, int | float), place
            assert limits["min"] <= value <= limits["max"], place
        elif kind == "BOOLEAN":
            assert isinstance(value, bool), place
        elif kind == "STRING":
            assert isinstance(value, str), place


@dataclass(frozen=True)
class Tiny:
    """What stands for the files of a template."""

    checkpoints: tuple[str, ...]
    """For each Load Diffusion Model (SP), in the order of the nodes."""
    vae: str = "wan_2_1"
    """One of the test pack's `NETWORKS` with the same latents."""
    text: dict[str, int] = field(default_factory=lambda: {"width": 64})
    """Widgets of SPTestConditioning."""
    width: int = 64
    height: int = 48
    length: int = 5
    vision: dict[str, int] = field(default_factory=dict)
    """Widgets of SPTestCLIPVisionOutput."""


TINY_FILES = {
    "cogvideox_i2v": Tiny((COGVIDEOX_I2V,)),
    "cogvideox_t2v": Tiny((COGVIDEOX,)),
    "flux2_t2i": Tiny((FLUX2,), "tiny_flux2"),
    "flux_t2i": Tiny((FLUX,), "tiny_flux"),
    "flux_tea_cache_t2i": Tiny((FLUX,), "tiny_flux"),
    "hunyuan_video_15_i2v": Tiny(
        (HUNYUAN_15,),
        "tiny_hunyuan_video_15",
        {"width": 64, "glyph_tokens": 3},
        vision={"tokens": 7, "width": 1152},
    ),
    "hunyuan_video_15_t2v": Tiny((HUNYUAN_15,), "tiny_hunyuan_video_15", {"width": 64, "glyph_tokens": 3}),
    "hunyuan_video_full_speed": Tiny((TINY,)),
    "hunyuan_video_t2v": Tiny((TINY,)),
    "ltxv_t2v": Tiny((LTXV,), "tiny_ltxv", width=128, height=96, length=9),
    "mochi_t2v": Tiny((MOCHI,), "tiny_mochi", {"width": 64, "valid_tokens": 5}, length=7),
    COMPARISON: Tiny((FLUX,), "tiny_flux"),
    "qwen_image_t2i": Tiny((QWEN_IMAGE,)),
    "wan_2_2_t2v": Tiny((WAN, "wan_comfy_quant.safetensors"), text={"width": 4096}),
    "wan_t2v": Tiny((WAN,), text={"width": 4096}),
}
SAMPLED_ELSEWHERE = FAMILIES.keys() - TINY_FILES.keys()
"""By `tests/comfyui/test_bundled_templates.py`, with stand-ins under the names of their files: checkpoints, LoRAs."""
PLAIN = ("flux_t2i", "hunyuan_video_15_t2v", "hunyuan_video_t2v", "wan_2_2_t2v")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")


def open_tiny(front_end: FrontEnd, name: str) -> Tiny:
    """The template with tiny models in the places of the real ones; nothing else is changed but sizes and devices."""
    tiny = TINY_FILES[name]
    front_end.load_workflow(read_workflow(name))
    size = {"width": tiny.width, "height": tiny.height, "length": tiny.length}
    front_end.replace_large_models(vae=tiny.vae, text=tiny.text, vision=tiny.vision, size=size)
    front_end.set_widget("SPLoadDiffusionModel", "unet_name", *tiny.checkpoints)
    front_end.set_widget("SPConfig", "devices", "cpu,cpu")
    return tiny


def test_every_template_is_run() -> None:
    assert {path.stem for path in WORKFLOWS} == TINY_FILES.keys() | SAMPLED_ELSEWHERE, "add its tiny files above"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in PLAIN else pytest.mark.extended)
        for name in TINY_FILES
        if name != COMPARISON
    ],
)
def test_a_template_runs(front_end: FrontEnd, name: str, tmp_path: Path) -> None:
    tiny = open_tiny(front_end, name)
    entry = front_end.run(timeout=240)
    front_end.screenshot(tmp_path / f"{name}.png")
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    check_results(front_end.server, entry, tiny)
    check_texts(front_end, read_workflow(name))
    assert front_end.own_errors() == []


def test_the_comparison_shows_equal_pictures_and_both_times(front_end: FrontEnd, tmp_path: Path) -> None:
    tiny = open_tiny(front_end, COMPARISON)
    front_end.set_widget("UNETLoader", "unet_name", *tiny.checkpoints)
    savers = front_end.save_latents("SPSampler")
    entry = front_end.run(timeout=240)
    front_end.screenshot(tmp_path / "compared.png")
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    check_results(front_end.server, entry, tiny)
    files = [entry["outputs"][saver]["latents"][0] for saver in savers]
    folder = front_end.server.base / "output"
    in_workers, alone = (load_file(folder / file["subfolder"] / file["filename"])["latent_tensor"] for file in files)
    assert relative_difference(in_workers, alone) <= 1e-4
    shown = front_end.node_texts()
    for text in (r"20 steps in the workers .*: \d+\.\d s", r"sampled step by step, as by KSampler, in \d+\.\d s"):
        assert len(re.findall(text, shown)) == 1, shown
    assert front_end.own_errors() == []


def check_results(server: ComfyServer, entry: dict[str, Any], tiny: Tiny) -> None:
    """There is a picture or a video, in a file that a program can show."""
    saved = [file for output in entry["outputs"].values() for file in output.get("images", [])]
    assert saved, entry["outputs"]
    for file in saved:
        path = server.base / "output" / file["subfolder"] / file["filename"]
        if path.suffix == ".mp4":
            assert path.read_bytes()[4:8] == b"ftyp"
        else:
            picture = Image.open(path)
            assert picture.size == (tiny.width, tiny.height)
            assert len(set(picture.convert("L").tobytes())) > 10, "the picture is empty"


def check_texts(front_end: FrontEnd, workflow: dict[str, Any]) -> None:
    """Each node says what it did: two workers shared every step, and every tile."""
    types = [node["type"] for node in workflow["nodes"]]
    expected = {
        r"(?:ulysses|cfg) 2, \d+\.\d\d s per step": sum(kind in SAMPLERS for kind in types),
        r"20 steps in the workers .*: \d+\.\d s": types.count("SPSampler"),
        r"\d+ tiles? on cpu,cpu in \d+\.\d s": types.count("SPVAEDecode"),
    }
    shown = front_end.node_texts()
    assert {text: len(re.findall(text, shown)) for text in expected} == expected, shown


def test_a_wrong_setting_is_shown_at_once(front_end: FrontEnd, tmp_path: Path) -> None:
    open_tiny(front_end, TEXT_TO_VIDEO)
    front_end.set_widget("SPConfig", "devices", "tpu")
    assert not front_end.queue()
    details = front_end.error_details()
    front_end.screenshot(tmp_path / "refused.png")
    assert re.search(r"devices\b.*\btpu\b", details), details
