"""What is said of ComfyUI's own templates: README's figures are the generated ones, and change as the pack does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.templates import facts, table, verdicts
from tests.templates.facts import Facts
from tests.templates.families import FAMILIES, family_of, quantised_as
from tests.templates.proven import PROVEN
from tests.templates.verdicts import judge
from tests.templates.workflow import as_prompt, model_chains, read

README = Path(__file__).parents[2] / "README.md"
WALKED = facts.read()
ROW = {row.template: row for row in WALKED.facts}
KREA2 = ROW["image_krea2_turbo_t2i"]


def verdict(row: Facts) -> str:
    return str(judge(row, WALKED.comfyui))


def test_readme_has_the_generated_block():
    """Else: python -m tests.templates.table, and put it between the marks."""
    match = re.search(r"<!-- templates:begin -->\n(.*)<!-- templates:end -->", README.read_text(), re.DOTALL)
    assert match is not None and match[1] == table.as_markdown(WALKED)


def test_what_has_been_proven_is_said_to_work():
    assert {name: verdict(ROW[name]) for name in PROVEN if not verdict(ROW[name]).startswith("works")} == {}


def test_a_class_without_a_plan_is_not_split(monkeypatch: pytest.MonkeyPatch):
    assert verdict(KREA2) == "works, split"
    monkeypatch.setattr(verdicts, "PLANS", {})
    assert verdict(KREA2) == "works, side by side"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"left": ("UNETLoader (weights)",)}, "refused by Use all GPUs: UNETLoader (weights)"),
        (
            {"loaders": ("ImageOnlyCheckpointLoader",)},
            "refused by Use all GPUs: ImageOnlyCheckpointLoader has no counterpart",
        ),
        ({"quantised": ("SVDQuant",)}, "refused by the loader: SVDQuant"),
        ({"nodes": ("FluxKVCache",)}, "refused by its name: FluxKVCache"),
        ({"nodes": ("NeverSeen",)}, "NeverSeen is not known here"),
        ({"beside": ("ControlNetApplyAdvanced",)}, "refused by the first step: ControlNet, of SingleStreamDiT"),
        ({"needs": "99.0.1"}, "needs a newer ComfyUI; there: works, split"),
        ({"networks": ("Later",), "missing": ("Later",)}, "needs a newer ComfyUI; there: Later is not known here"),
    ],
)
def test_what_stands_in_the_way_is_named(change: dict[str, Any], said: str):
    assert verdict(replace(KREA2, **change)) == said


def test_nodes_with_a_model_work_or_not():
    """One table says it, of which a test in a server runs each line."""
    assert {"SPTestOption"} >= verdicts.WORKS & verdicts.REFUSED
    assert {"KSampler", "SeedVR2Conditioning"} <= verdicts.WORKS
    assert {"WanAnimate2Cache", "BlockSparseAttention"} <= verdicts.REFUSED


def test_facts_are_read_as_they_were_written(tmp_path: Path):
    facts.write(WALKED, tmp_path / "facts.tsv")
    assert facts.read(tmp_path / "facts.tsv") == WALKED


def test_names_of_files_tell_family_and_format():
    assert [family_of(name).title for name in ("fasth3_8step.safetensors", "minimax_h3_fl2va.safetensors")] == [
        "FastH3",
        "MiniMax-H3",
    ]
    assert family_of("nobody.safetensors").network == ""
    assert quantised_as("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors") == "fp8_scaled"
    assert quantised_as("ltx-2.5-comfy-int8-convrot.safetensors") == "int8_convrot"
    assert len({family.pattern for family in FAMILIES}) == len(FAMILIES)


def put(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def node(number: int, kind: str, inputs: list, outputs: list[str], values: list | None = None, **more: Any) -> dict:
    outputs = [{"type": name} for name in outputs]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": values or [], **more}


DEFINITIONS = {
    "Load": {"input": {"required": {"file": [["a", "b"], {}], "dtype": [["x"], {}]}}},
    "Lora": {"input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {}]}}},
    "Sample": {
        "input": {
            "required": {"model": ["MODEL"], "seed": ["INT", {"control_after_generate": True}], "steps": ["INT", {}]},
            "optional": {"latent": ["LATENT"]},
        }
    },
}
INSIDE = {
    "id": "graph-1",
    "name": "Inside",
    "inputs": [{"name": "latent", "type": "LATENT"}, {"name": "file", "type": "COMBO"}],
    "outputs": [{"name": "result", "type": "LATENT"}],
    "nodes": [
        node(1, "Load", [put("file", "COMBO", 1, True)], ["MODEL"], ["a", "x"]),
        node(2, "Lora", [put("model", "MODEL", 2)], ["MODEL"], [0.5]),
        node(3, "Lora", [put("model", "MODEL", 3)], ["MODEL"], [0.7], mode=4),
        node(
            4,
            "Sample",
            [put("model", "MODEL", 4), put("latent", "LATENT", 5), put("note", "*", 7)],
            ["LATENT"],
            [7, "fixed", 20],
        ),
    ],
    "links": [
        {"id": 1, "origin_id": -10, "origin_slot": 1, "target_id": 1, "target_slot": 0, "type": "COMBO"},
        {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"},
        {"id": 3, "origin_id": 2, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "MODEL"},
        {"id": 4, "origin_id": 3, "origin_slot": 0, "target_id": 4, "target_slot": 0, "type": "MODEL"},
        {"id": 5, "origin_id": -10, "origin_slot": 0, "target_id": 4, "target_slot": 1, "type": "LATENT"},
        {"id": 7, "origin_id": -10, "origin_slot": 1, "target_id": 4, "target_slot": 2, "type": "*"},
        {"id": 6, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
    ],
}
WORKFLOW = {
    "nodes": [
        node(8, "Empty", [], ["LATENT"]),
        node(9, "graph-1", [put("file", "COMBO", None, True), put("latent", "LATENT", 10)], ["LATENT"], ["b"]),
        node(10, "Save", [put("samples", "LATENT", 12)], []),
        node(11, "Reroute", [put("", "*", 11)], ["*"]),
        node(12, "Save", [put("samples", "LATENT", 12)], [], mode=2),
    ],
    "links": [[10, 8, 0, 9, 1, "LATENT"], [11, 9, 0, 11, 0, "LATENT"], [12, 11, 0, 10, 0, "LATENT"]],
    "definitions": {"subgraphs": [INSIDE]},
}


def test_a_workflow_is_read_through_subgraphs_bypassed_nodes_and_reroutes():
    nodes = read(WORKFLOW, DEFINITIONS)
    assert as_prompt(nodes) == {
        "8": {"class_type": "Empty", "inputs": {}},
        "10": {"class_type": "Save", "inputs": {"samples": ["9:4", 0]}},
        "9:1": {"class_type": "Load", "inputs": {"file": "b", "dtype": "x"}},
        "9:2": {"class_type": "Lora", "inputs": {"strength": 0.5, "model": ["9:1", 0]}},
        "9:4": {
            "class_type": "Sample",
            "inputs": {"seed": 7, "steps": 20, "note": "b", "model": ["9:2", 0], "latent": ["8", 0]},
        },
    }
    assert list(model_chains(nodes)) == [("9:1", "9:4", ["9:2"])]
