"""Walks ComfyUI's own templates, converts each, and says whether it works then:

    python -m tests.templates.walk FOLDER --server http://127.0.0.1:8188 [--comfyui ~/ComfyUI] [--write]

FOLDER holds comfyui-workflow-templates-json, unpacked. The server is a running ComfyUI with this pack; a file with what
its /object_info answers will do. --write keeps what the templates need in facts.tsv, which README's table is made of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.comfyui.installation import find_installation
from tests.templates import facts as kept
from tests.templates import table
from tests.templates.facts import Facts, Walked
from tests.templates.families import family_of, quantised_as
from tests.templates.verdicts import CONTROL, REFUSED
from tests.templates.workflow import Definitions, Node, model_chains, read

CONVERT = Path(__file__).parents[1] / "browser" / "convert_templates.mjs"
NO_SAMPLERS = ("GetICLoRAParameters", "RTDETR_detect", "SAM3_Detect", "SAM3_VideoTrack", "SDPoseKeypointExtractor")
"""They take a MODEL and sample nothing."""
LOADERS = ("CheckpointLoaderSimple", "ImageOnlyCheckpointLoader", "UNETLoader", "UnetLoaderGGUF")
_FILE = re.compile(r"\.(safetensors|sft|gguf|ckpt)$")
_OF_THE_FRONT_END = ("Note", "MarkdownNote", "PrimitiveNode", "Reroute")


def converted(folder: Path, object_info: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All workflows of a folder after the one-click conversion, and its reports, by file name."""
    with tempfile.TemporaryDirectory() as written:
        command = ["node", str(CONVERT), str(folder), object_info, "--write", written]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        workflows = {path.name: json.loads(path.read_text()) for path in Path(written).iterdir()}
    return workflows, json.loads(ended.stdout)["files"]


def index(folder: Path) -> Iterator[dict[str, Any]]:
    """What the templates' index says of each."""
    for group in json.loads((folder / "index.json").read_text()):
        yield from group["templates"]


def look(
    told: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Any,
    report: Any,
    definitions: Definitions,
    classes: set[str],
) -> Facts | None:
    """What a template needs.

    Args:
        told: of the index.
        before: the template.
        after: the same, converted.
        report: of the conversion.
        definitions: of the nodes that exist.
        classes: that ComfyUI's networks are of.

    Returns:
        None if no local diffusion model reaches a sampler.
    """
    nodes = read(after, definitions)
    chains = [chain for chain in model_chains(nodes) if nodes[chain[1]].type not in NO_SAMPLERS]
    own = read(before, definitions)
    chains = [chain for chain in chains if own[chain[0]].type in LOADERS]
    if not chains:
        return None
    loaders = list(dict.fromkeys(first for first, _, _ in chains))
    files = [_file(nodes[name]) for name in loaders]
    families = [family_of(name) for name in files]
    networks = {family.network or "?" for family in families}
    types = {node.type for node in own.values()}
    left = [place for place in report["left"] if any(name.split(":")[-1] == str(place["id"]) for name in loaders)]
    return Facts(
        usage=told["usage"],
        template=told["name"],
        needs=told.get("minComfyUIVersion") or "",
        families=_sorted(family.title for family in families),
        networks=_sorted(networks),
        quantised=_sorted(quantised_as(name) for name in files),
        loaders=_sorted(nodes[name].type for name in loaders),
        left=_sorted(_reason(place) for place in left),
        nodes=_sorted(nodes[name].type for _, _, way in chains for name in way),
        samplers=_sorted(nodes[last].type for _, last, _ in chains),
        beside=_sorted(types & ({*CONTROL, *REFUSED} - {nodes[name].type for _, _, way in chains for name in way})),
        missing=_sorted((networks - classes) | (types - set(definitions) - set(_OF_THE_FRONT_END))),
    )


def _file(node: Node) -> str:
    """That a loader reads, or else one that the template names."""
    named = [*node.values.values(), *(model.get("name") for model in node.files)]
    return next((name for name in named if isinstance(name, str) and _FILE.search(name)), "")


def _reason(place: Mapping[str, Any]) -> str:
    why = f"{place['name']} is {place['value']}" if place["reason"] == "value" else place["reason"]
    return f"{place['type']} ({why})"


def _sorted(names: Any) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def classes_of(comfyui: Path) -> set[str]:
    """Names of the classes in `comfy/ldm`."""
    sources = (comfyui / "comfy" / "ldm").rglob("*.py")
    return {name for path in sources for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.templates.walk", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="address, or a file of /object_info")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder")
    parser.add_argument("--write", action="store_true", help="keep facts.tsv")
    options = parser.parse_args()
    found = options.comfyui or getattr(find_installation()[0], "path", None)
    if found is None:
        sys.exit("no ComfyUI found; name its folder with --comfyui")
    templates = options.folder / "templates" if (options.folder / "templates").is_dir() else options.folder
    definitions = _object_info(options.server)
    classes = classes_of(found)
    after, reports = converted(templates, options.server)
    rows = []
    for told in index(templates):
        name = f"{told['name']}.json"
        workflow = json.loads((templates / name).read_text())
        if (
            name in after
            and (row := look(told, workflow, after[name], reports[name], definitions, classes)) is not None
        ):
            rows.append(row)
    rows.sort(key=lambda row: (-row.usage, row.template))
    walked = Walked(_version_of(options.folder), _comfyui_version(found), tuple(rows))
    if options.write:
        kept.write(walked)
    print(table.as_text(walked))


def _object_info(place: str) -> Definitions:
    if not place.startswith("http"):
        return json.loads(Path(place).read_text())
    with urllib.request.urlopen(f"{place.rstrip('/')}/object_info") as answer:
        return json.load(answer)


def _comfyui_version(folder: Path) -> str:
    return re.findall(r'"(.*)"', (folder / "comfyui_version.py").read_text())[0]


def _version_of(folder: Path) -> str:
    """Of the package, by the folder of its metadata, which lies beside it."""
    places = [*folder.parent.glob("comfyui_workflow_templates_json-*.dist-info")]
    return places[0].name.split("-")[1].removesuffix(".dist") if places else "?"


if __name__ == "__main__":
    main()
