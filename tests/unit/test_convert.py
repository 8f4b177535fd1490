"""The conversion of saved workflows to this pack's loaders and back, run by Node as a script runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "browser" / "convert_templates.mjs"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

Workflow = dict[str, Any]
Report = dict[str, list[dict[str, Any]]]
Convert = Callable[..., tuple[Workflow, Report]]

COMBO = [["a.safetensors", "b.safetensors"], {}]
DTYPES = [["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"], {}]
TILES = {"tile_size": ["INT", {"default": 512}], "overlap": ["INT", {"default": 64}]}
SP_CONFIG = {"sp_config": ["SP_CONFIG", {}]}


def definition(required: dict, optional: dict | None = None, category: str = "loaders") -> dict:
    return {"input": {"required": required, "optional": optional or {}}, "category": category}


PACK = {"category": "sequence parallel"}
DEFINITIONS = {
    "UnetLoaderGGUF": definition({"unet_name": COMBO}),
    "UNETLoader": definition({"unet_name": COMBO, "weight_dtype": DTYPES}),
    "CheckpointLoaderSimple": definition({"ckpt_name": COMBO}),
    "VAEDecode": definition({"samples": ["LATENT"], "vae": ["VAE"]}),
    "VAEDecodeTiled": definition({"samples": ["LATENT"], "vae": ["VAE"], **TILES}),
    "SPConfig": definition({"devices": ["STRING", {"default": "auto"}], "ring_degree": ["INT", {}]}, **PACK),
    "SPLoadDiffusionModel": definition(
        {"unet_name": ["COMBO", {"options": COMBO[0]}], "weight_dtype": ["COMBO", {"options": DTYPES[0]}]},
        SP_CONFIG | {"more": ["FLOAT", {"default": 0.5}]},
        **PACK,
    ),
    "SPLoadCheckpoint": definition({"ckpt_name": COMBO}, SP_CONFIG, **PACK),
    "SPVAEDecode": definition({"samples": ["LATENT"], "vae": ["VAE"], **TILES}, SP_CONFIG, **PACK),
    "SPSampler": definition({"model": ["MODEL"]}, **PACK),
    "SPVAE": definition({"vae": ["VAE"]}, SP_CONFIG, **PACK),
}


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Runs the script on one workflow."""

    def run(
        workflow: Workflow, *options: str, without: tuple[str, ...] = (), undo: bool = False
    ) -> tuple[Workflow, Report]:
        folder, written, known = tmp_path / "in", tmp_path / "out", tmp_path / "object_info.json"
        folder.mkdir(exist_ok=True)
        (folder / "one.json").write_text(json.dumps(workflow))
        known.write_text(json.dumps({name: found for name, found in DEFINITIONS.items() if name not in without}))
        arguments = [*options, *(["--undo"] if undo else [])]
        done = subprocess.run(
            [NODE, SCRIPT, folder, known, "--write", written, *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        converted = json.loads((written / "one.json").read_text())
        check_links(converted)
        return converted, json.loads(done.stdout)["files"]["one.json"]

    return run


def node(id: int, type: str, inputs: list | None = None, outputs: list | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "type": type,
        "pos": [100 * id, 50],
        "size": [80, 60],
        "flags": {},
        "order": id,
        "mode": 0,
        "inputs": inputs or [],
        "outputs": outputs or [],
        "properties": {"Node name for S&R": type},
    } | more


def widget(name: str, link: int | None = None, type: str = "COMBO") -> dict[str, Any]:
    return {"name": name, "type": type, "widget": {"name": name}, "link": link}


def socket(name: str, type: str, link: int | None = None) -> dict[str, Any]:
    return {"name": name, "type": type, "link": link}


def output(type: str, *links: int) -> dict[str, Any]:
    return {"name": type, "type": type, "links": list(links) or None}


def loader(id: int, *links: int, dtype: str = "default", **more: Any) -> dict[str, Any]:
    inputs = more.pop("inputs", [widget("unet_name"), widget("weight_dtype")])
    values = {"widgets_values": ["b.safetensors", dtype]}
    return node(id, "UNETLoader", inputs, [output("MODEL", *links)], **values | more)


def sampler(id: int, link: int, type: str = "KSampler", **more: Any) -> dict[str, Any]:
    return node(id, type, [socket("model", "MODEL", link)], **more)


def root(nodes: list, links: list, **more: Any) -> Workflow:
    return {"last_node_id": 20, "last_link_id": 30, "nodes": nodes, "links": links, "extra": {}, "version": 0.4} | more


def simple(**more: Any) -> Workflow:
    return root([loader(1, 5, **more), sampler(2, 5)], [[5, 1, 0, 2, 0, "MODEL"]])


def nested() -> Workflow:
    """A loader whose file is chosen outside, in a subgraph of a subgraph; another one beside the inner subgraph."""
    inner_links = [
        {"id": 7, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "COMBO"},
        {"id": 8, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
    ]
    chosen = loader(1, 8)
    chosen["inputs"][0]["link"] = 7
    inner = {
        "id": "inner-id",
        "name": "Inner",
        "state": {"lastNodeId": 9, "lastLinkId": 9, "lastGroupId": 0, "lastRerouteId": 0},
        "inputNode": {"id": -10, "bounding": [-200, 50, 120, 60]},
        "outputNode": {"id": -20, "bounding": [600, 50, 120, 60]},
        "inputs": [{"id": "i", "name": "unet_name", "type": "COMBO", "linkIds": [7]}],
        "outputs": [{"id": "o", "name": "MODEL", "type": "MODEL", "linkIds": [8]}],
        "nodes": [chosen],
        "links": inner_links,
    }
    outer_links = [
        {"id": 11, "origin_id": 3, "origin_slot": 0, "target_id": 4, "target_slot": 0, "type": "MODEL"},
        {"id": 12, "origin_id": 5, "origin_slot": 0, "target_id": 6, "target_slot": 0, "type": "MODEL"},
    ]
    outer = {
        "id": "outer-id",
        "name": "Outer",
        "state": {"lastNodeId": 9, "lastLinkId": 12, "lastGroupId": 0, "lastRerouteId": 0},
        "inputs": [],
        "outputs": [],
        "nodes": [
            node(3, "inner-id", [widget("unet_name")], [output("MODEL", 11)], widgets_values=["a.safetensors"]),
            sampler(4, 11),
            loader(5, 12),
            sampler(6, 12),
        ],
        "links": outer_links,
    }
    host = node(10, "outer-id", properties={"proxyWidgets": [["5", "unet_name"], ["4", "seed"]]})
    return root([host], [], definitions={"subgraphs": [outer, inner]})


def levels(workflow: Workflow) -> list[dict[str, Any]]:
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def by_id(graph: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {each["id"]: each for each in graph["nodes"]}


def check_links(workflow: Workflow) -> None:
    """Links and slots name each other, and ids are unique and below the last ones."""
    nodes = [each["id"] for graph in levels(workflow) for each in graph["nodes"]]
    assert len(set(nodes)) == len(nodes) and max(nodes) <= workflow["last_node_id"]
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    seen = []
    for graph in levels(workflow):
        assert all(isinstance(link, list) == (graph is workflow) for link in graph["links"])
        links = [dict(zip(fields, link, strict=True)) if isinstance(link, list) else link for link in graph["links"]]
        seen += [link["id"] for link in links]
        known = by_id(graph)
        for link in links:
            if link["target_id"] in known:
                assert known[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
            if link["origin_id"] in known:
                assert link["id"] in known[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        ids = {link["id"] for link in links}
        for each in graph["nodes"]:
            assert {slot["link"] for slot in each["inputs"]} - {None} <= ids
            assert {link for slot in each["outputs"] for link in slot["links"] or []} <= ids
    assert len(set(seen)) == len(seen) and max(seen, default=0) <= workflow["last_link_id"]


def test_a_loader_keeps_all_but_its_type(convert: Convert) -> None:
    kept = {"title": "Mine", "color": "#322", "bgcolor": "#533", "mode": 4, "showAdvanced": True}
    native = simple(**kept)
    converted, report = convert(native)
    before, after = by_id(native)[1], by_id(converted)[1]
    for name in ("id", "pos", "size", "flags", "outputs", *kept):
        assert after[name] == before[name], name
    assert after["type"] == "SPLoadDiffusionModel"
    assert after["widgets_values"] == ["b.safetensors", "default", 0.5], "a further widget has its default"
    assert [slot["name"] for slot in after["inputs"]] == ["sp_config", "unet_name", "weight_dtype", "more"]
    assert by_id(converted)[2] == by_id(native)[2]
    assert report["converted"] == [{"id": 1, "type": "UNETLoader", "where": "", "to": "SPLoadDiffusionModel"}]
    assert report["left"] == report["removed"] == []


def test_one_config_for_all_loaders_of_a_level(convert: Convert) -> None:
    links = [[5, 1, 0, 3, 0, "MODEL"], [6, 2, 0, 4, 0, "MODEL"]]
    converted, report = convert(root([loader(1, 5), loader(2, 6), sampler(3, 5), sampler(4, 6)], links))
    assert report["added"] == [{"id": 21, "type": "SPConfig", "where": ""}]
    config = by_id(converted)[21]
    assert config["widgets_values"] == ["auto", 0]
    assert config["outputs"][0]["links"] == [31, 32]
    assert [by_id(converted)[id]["inputs"][0]["link"] for id in (1, 2)] == [31, 32]


def test_a_config_stands_beside_other_nodes(convert: Convert) -> None:
    crowd = [node(id, "Note", pos=[100 - 360 * i, 50], size=[300, 600]) for i, id in enumerate((5, 6, 7), start=1)]
    groups = [{"title": "Models", "bounding": [60, -40, 400, 300]}]
    converted, report = convert(root([loader(1), *crowd], [], groups=groups))
    placed = by_id(converted)[report["added"][0]["id"]]
    left, top = placed["pos"][0], placed["pos"][1] - 30
    right, bottom = left + placed["size"][0], placed["pos"][1] + placed["size"][1]
    for other in converted["nodes"]:
        if other is placed:
            continue
        x, y = other["pos"]
        w, h = other["size"]
        assert right <= x or x + w <= left or bottom <= y - 30 or y + h <= top, other
    x, y, w, h = groups[0]["bounding"]
    assert right <= x or x + w <= left or bottom <= y or y + h <= top, "it crosses the group's border"


@pytest.mark.parametrize(("mode", "reused"), [(0, True), (2, False), (4, False)])
def test_a_config_that_is_there_is_used_unless_it_never_runs(convert: Convert, mode: int, reused: bool) -> None:
    config = node(3, "SPConfig", outputs=[output("SP_CONFIG")], mode=mode, widgets_values=["cuda:1", 0])
    workflow = simple()
    workflow["nodes"].append(config)
    converted, report = convert(workflow)
    assert bool(report["added"]) != reused
    assert bool(by_id(converted)[3]["outputs"][0]["links"]) == reused


def test_subgraphs_keep_what_they_show_outside(convert: Convert) -> None:
    native = nested()
    converted, report = convert(native)
    assert sorted((each["where"], each["id"]) for each in report["converted"]) == [("Inner", 1), ("Outer", 5)]
    assert sorted(each["where"] for each in report["added"]) == ["Inner", "Outer"]
    assert by_id(converted)[10] == by_id(native)[10]
    outer, inner = converted["definitions"]["subgraphs"]
    assert by_id(outer)[3] == by_id(native["definitions"]["subgraphs"][0])[3]
    assert inner["inputs"] == native["definitions"]["subgraphs"][1]["inputs"]
    assert by_id(inner)[1]["inputs"][1]["link"] == 7
    assert next(link for link in inner["links"] if link["id"] == 7)["target_slot"] == 1


@pytest.mark.parametrize("make", [simple, nested])
def test_back_is_as_before(convert: Convert, make: Callable[[], Workflow]) -> None:
    native = make()
    converted, _ = convert(native)
    back, report = convert(converted, undo=True)
    assert report["left"] == [] and len(report["removed"]) == len(levels(native)) - (make is nested)
    for graph, expected in zip(levels(back), levels(native), strict=True):
        for name in ("nodes", "links", "inputs"):
            assert graph.get(name) == expected.get(name)


def test_origin_of_a_node_comes_back(convert: Convert) -> None:
    origin = {"cnr_id": "comfy-core", "ver": "0.3.48"}
    native = simple(properties={"Node name for S&R": "UNETLoader", "models": [{"name": "b"}], **origin})
    converted, _ = convert(native)
    properties = by_id(converted)[1]["properties"]
    assert properties["Node name for S&R"] == "SPLoadDiffusionModel" and properties["models"] == [{"name": "b"}]
    assert not origin.keys() & properties.keys(), "the Manager would look for the node in ComfyUI"
    back, _ = convert(converted, undo=True)
    assert by_id(back)[1]["properties"] == by_id(native)[1]["properties"]


def test_inputs_that_the_file_leaves_out(convert: Convert) -> None:
    """*Save* writes inputs of widgets only where they are connected."""
    native = simple(inputs=[widget("weight_dtype", 6)], widgets_values_named={"unet_name": "b.safetensors"})
    native["nodes"].append(node(3, "PrimitiveNode", outputs=[output("COMBO", 6)]))
    native["links"].append([6, 3, 0, 1, 0, "COMBO"])
    converted, _ = convert(native)
    assert [6, 3, 0, 1, 2, "COMBO"] in converted["links"]
    assert by_id(converted)[1]["widgets_values_named"] == {
        "unet_name": "b.safetensors",
        "weight_dtype": "default",
        "more": 0.5,
    }


def test_checkpoints(convert: Convert) -> None:
    outputs = [output("MODEL", 5), output("CLIP"), output("VAE")]
    checkpoint = node(1, "CheckpointLoaderSimple", [widget("ckpt_name")], outputs, widgets_values=["b.safetensors"])
    native = root([checkpoint, sampler(2, 5)], [[5, 1, 0, 2, 0, "MODEL"]])
    converted, _ = convert(native)
    after = by_id(converted)[1]
    assert after["type"] == "SPLoadCheckpoint"
    assert after["widgets_values"] == ["b.safetensors"] and after["outputs"] == outputs
    back, _ = convert(converted, undo=True)
    assert back["nodes"] == native["nodes"]

    same, report = convert(native, without=("SPLoadCheckpoint",))
    assert same == native
    assert [(each["reason"], each["node"]) for each in report["left"]] == [("unregistered", "SPLoadCheckpoint")]


def test_a_gguf_file_goes_to_the_packs_loader_and_back(convert: Convert) -> None:
    """Back also where no conversion has made the node; ComfyUI's own loader does not read it."""
    loads = node(1, "UnetLoaderGGUF", [widget("unet_name")], [output("MODEL", 5)], widgets_values=["a.gguf"])
    native = root([loads, sampler(2, 5)], [[5, 1, 0, 2, 0, "MODEL"]])
    converted, _ = convert(native)
    after = by_id(converted)[1]
    assert after["type"] == "SPLoadDiffusionModel"
    assert after["widgets_values"] == ["a.gguf", "default", 0.5]
    back, _ = convert(converted, undo=True)
    assert back["nodes"] == native["nodes"]
    del after["properties"]["sp_replaced"]
    back, _ = convert(converted, undo=True)
    assert by_id(back)[1]["type"] == "UnetLoaderGGUF"

    after["properties"]["sp_replaced"] = {"type": "UNETLoader"}
    same, report = convert(converted, undo=True)
    assert by_id(same)[1]["type"] == "SPLoadDiffusionModel"
    assert [(each["reason"], each["value"]) for each in report["left"]] == [("value", "a.gguf")]


def left_alone() -> list[Any]:
    other = node(1, "NunchakuFluxDiTLoader", [widget("model_path")], [output("MODEL", 5)])
    links = [[5, 1, 0, 2, 0, "MODEL"]]
    group = {"groupNodes": {"Mine": {"nodes": [{"type": "UNETLoader"}]}}}
    tracking = [loader(1, 5), node(2, "LoraLoaderModelOnly", [socket("model", "MODEL", 5)], [output("MODEL", 6)])]
    tracking.append(sampler(3, 6, "SAM3_Detect"))
    return [
        pytest.param(root([other, sampler(2, 5)], links), "no counterpart", id="other loader"),
        pytest.param(simple(dtype="fp8_e4m3fn_fast"), "value", id="refused dtype"),
        pytest.param(simple(widgets_values=["a.ckpt", "default"]), "value", id="no safetensors file"),
        pytest.param(root([node(1, "workflow>Mine")], [], extra=group), "group node", id="group node"),
        pytest.param(root(tracking, [*links, [6, 2, 0, 3, 0, "MODEL"]]), "weights", id="needs the weights"),
    ]


@pytest.mark.parametrize(("workflow", "reason"), left_alone())
def test_left_with_a_reason(convert: Convert, workflow: Workflow, reason: str) -> None:
    same, report = convert(workflow)
    assert same == workflow
    assert [each["reason"] for each in report["left"]] == [reason]
    assert report["converted"] == report["added"] == []


def test_what_only_passes_a_model_on_is_no_loader(convert: Convert) -> None:
    passing = [
        node(3, "ComfySwitchNode", [socket("on", "COMFY_MATCHTYPE_V3")], [output("MODEL")]),
        node(4, "Reroute", [socket("", "*")], [output("MODEL")]),
        node(5, "GetNode", outputs=[output("MODEL")]),
        node(6, "LoraLoaderModelOnly", [socket("model", "MODEL")], [output("MODEL")]),
    ]
    workflow = simple()
    workflow["nodes"] += passing
    assert convert(workflow)[1]["left"] == []


def decoding(type: str, **more: Any) -> Workflow:
    inputs = [socket("samples", "LATENT", 5), socket("vae", "VAE", 6)]
    nodes = [
        node(1, "KSampler", outputs=[output("LATENT", 5)]),
        node(2, "VAELoader", outputs=[output("VAE", 6)]),
        node(3, type, inputs, [output("IMAGE")], **more),
    ]
    return root(nodes, [[5, 1, 0, 3, 0, "LATENT"], [6, 2, 0, 3, 1, "VAE"]])


@pytest.mark.parametrize(
    ("type", "values", "expected"),
    [("VAEDecode", [], [512, 64]), ("VAEDecodeTiled", [256, 32], [256, 32])],
)
def test_decoding_is_replaced_if_it_is_asked_for(convert: Convert, type: str, values: list, expected: list) -> None:
    native = decoding(type, widgets_values=values)
    assert convert(native) == (native, {"converted": [], "left": [], "added": [], "removed": []})
    converted, report = convert(native, "--decode")
    after = by_id(converted)[3]
    assert after["type"] == "SPVAEDecode" and after["widgets_values"] == expected
    assert report["added"] == [], "it takes the workers that are there"
    back, _ = convert(converted, undo=True)
    assert (by_id(back)[3]["type"], by_id(back)[3]["widgets_values"]) == (type, values)


def test_nodes_that_nothing_converted_go_back_too(convert: Convert) -> None:
    tiles = [widget("tile_size", type="INT"), widget("overlap", type="INT")]
    own = decoding("SPVAEDecode", widgets_values=[128, 16])
    own["nodes"][2]["inputs"] += tiles
    own["nodes"].append(node(4, "SPSampler"))
    back, report = convert(own, undo=True)
    assert by_id(back)[3]["type"] == "VAEDecodeTiled" and by_id(back)[3]["widgets_values"] == [128, 16]
    assert [(each["type"], each["reason"]) for each in report["left"]] == [("SPSampler", "no counterpart")]


def test_a_folder_does_not_go_back(convert: Convert) -> None:
    converted, _ = convert(simple())
    by_id(converted)[1]["widgets_values"][0] = "CogVideoX1.5-5B"
    same, report = convert(converted, undo=True)
    assert same == converted
    assert [(each["reason"], each["node"]) for each in report["left"]] == [("value", "UNETLoader")]


def test_a_config_that_others_need_stays(convert: Convert) -> None:
    converted, _ = convert(simple())
    config = by_id(converted)[21]
    shared = deepcopy(converted)
    shared["last_link_id"] = 32
    shared["nodes"].append(node(4, "SPVAE", [socket("sp_config", "SP_CONFIG", 32)]))
    by_id(shared)[21]["outputs"][0]["links"].append(32)
    shared["links"].append([32, 21, 0, 4, 0, "SP_CONFIG"])
    back, report = convert(shared, undo=True)
    assert report["removed"] == [] and by_id(back)[21]["outputs"][0]["links"] == [32]

    devices = config["inputs"][0]
    assert devices["name"] == "devices"
    fed = deepcopy(converted)
    fed["last_link_id"] = 32
    fed["nodes"].append(node(4, "PrimitiveString", outputs=[output("STRING", 32)]))
    by_id(fed)[21]["inputs"][0]["link"] = 32
    fed["links"].append([32, 4, 0, 21, 0, "STRING"])
    _, report = convert(fed, undo=True)
    assert report["removed"] == [] and [each["reason"] for each in report["left"]] == ["in use"]

    native = nested()
    converted, report = convert(native)
    inner = next(each["id"] for each in report["added"] if each["where"] == "Inner")
    by_id(converted["definitions"]["subgraphs"][0])[3]["properties"]["proxyWidgets"] = [[str(inner), "devices"]]
    _, report = convert(converted, undo=True)
    assert [(each["id"], each["reason"]) for each in report["left"]] == [(inner, "in use")]
    assert [each["where"] for each in report["removed"]] == ["Outer"]


def test_reroutes_of_a_removed_link_go_with_it(convert: Convert) -> None:
    converted, _ = convert(simple())
    kept = {"id": 2, "pos": [0, 0], "linkIds": [5]}
    converted["extra"]["reroutes"] = [{"id": 1, "pos": [0, 0], "linkIds": [31]}, kept]
    converted["extra"]["linkExtensions"] = [{"id": 31, "parentId": 1}, {"id": 5, "parentId": 2}]
    back, _ = convert(converted, undo=True)
    assert back["extra"]["reroutes"] == [kept]
    assert back["extra"]["linkExtensions"] == [{"id": 5, "parentId": 2}]


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run([NODE, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage" in done.stderr
