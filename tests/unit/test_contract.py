"""The contract with ComfyUI: it lists what the pack uses, and finds what a ComfyUI has changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.__main__ import main
from parallel.comfyui import contract
from parallel.comfyui.contract import PARTS, Symbol, symbols
from parallel.comfyui.contract_readers import Sources, dotted
from parallel.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
USING = [*sorted((ROOT / "nodes").glob("*.py")), *sorted((ROOT / "parallel" / "comfyui").glob("*.py"))]
USING = [file for file in USING if not file.name.startswith("contract")]
CALLING = [*USING, *(ROOT / "parallel" / name for name in ("worker/native_vae.py", "split/routes.py"))]
LIBRARY = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "execution", "folder_paths",
    "latent_preview", "server",
}  # fmt: skip
ALWAYS_THERE = {"__file__", "__name__"}
HELD_AS = {
    "executor": "comfy.patcher_extension.WrapperExecutor",
    "guider": "comfy.samplers.CFGGuider",
    "server": "server.PromptServer",
    "shadow": "comfy.sd.VAE",
    "vae": "comfy.sd.VAE",
}
"""What the pack calls objects of ComfyUI's → their class."""
LISTED = [symbol for part in PARTS.values() for symbol in symbols(part)]


def used(file: Path) -> Iterator[tuple[str, ast.Call | None]]:
    """Symbols of ComfyUI's that a file names, with their calls."""
    tree = ast.parse(file.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0]: alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner and (path := dotted(node)):
            start = HELD_AS[path[0]] if path[0] in HELD_AS and path[1:] else names.get(path[0], "")
            if start.partition(".")[0] in {*LIBRARY, "nodes"}:
                yield ".".join([start, *(name for name in path[1:] if name not in ALWAYS_THERE)]), calls.get(id(node))


def listed(title: str) -> list[Symbol]:
    """The symbol, or one of a module, or of a class, that it is a beginning of; or the symbol that it goes on from."""
    whole = [symbol for symbol in LISTED if symbol.title == title]
    return whole or [
        symbol
        for symbol in LISTED
        if symbol.title.startswith(f"{title}.") or (symbol.call is None and title.startswith(f"{symbol.title}."))
    ]


@pytest.mark.parametrize("file", USING, ids=lambda file: file.stem)
def test_what_the_pack_uses_is_listed(file: Path):
    for title, call in used(file):
        found = listed(title)
        assert found, f"{file.name} uses {title}: add it to parallel/comfyui/contract.py"
        if call is None or any(isinstance(each, ast.Starred) for each in call.args):
            continue
        needed = (len(call.args), {word.arg for word in call.keywords if word.arg})
        offered = [(len(s.call.args), {w.arg for w in s.call.keywords}) for s in found if s.call is not None]
        assert not offered or any(needed[0] <= count and needed[1] <= words for count, words in offered), (
            f"{file.name} calls {title} with arguments that the contract does not list"
        )


def test_nothing_is_listed_that_the_pack_does_not_use():
    words: set[str] = set()
    for file in [*CALLING, *(ROOT / "parallel" / "plans").glob("*.py"), *(ROOT / "nodes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            found = (getattr(node, field, None) for field in ("id", "attr", "arg", "value", "name", "module"))
            words |= {word for each in found if isinstance(each, str) for word in [each, *each.split(".")]}
    text = "\n".join(file.read_text() for file in CALLING)
    for symbol in LISTED:
        named = symbol.words or (tuple(symbol.takes.parameters) if symbol.takes else ())
        lacking = [word for word in named if word not in words and word not in text]
        assert symbol.names[-1] in words or (named and not lacking), f"{symbol.title} is not used"


MODEL_PATCHER = """
class Base:
    def detach(self): ...
class ModelPatcher(Base):
    def __init__(self, model, load_device, offload_device, size=0, {parameter}=False):
        self.patches = {{}}
        model.model_loaded_weight_memory, model.current_weight_patches_uuid = 0, None
    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False{new}): ...
"""


@pytest.mark.parametrize(
    ("parameter", "new", "expected"),
    [
        ("weight_inplace_update", "", set()),
        ("weight_inplace_update", ", stream=None", {"ModelPatcher.partially_load: a new parameter 'stream'"}),
    ],
)
def test_a_synthetic_file(tmp_path: Path, parameter: str, new: str, expected: set[str]):
    file = tmp_path / "model_patcher.py"
    file.write_text(MODEL_PATCHER.format(parameter=parameter, new=new))
    found = set(contract.differences(Sources({"comfy.model_patcher": file})))
    assert not [what for what in found if "detach" in what or what.endswith("ModelPatcher.patches is missing")]
    assert "comfy.model_patcher.ModelPatcher.clone is missing" in found
    assert {what.removeprefix("comfy.model_patcher.") for what in found if "is missing" not in what} == expected


TREE = {
    "comfy_api/latest/__init__.py": "from . import _io_public as io\nclass ComfyExtension: ...",
    "comfy_api/latest/_io_public.py": "from ._io import *",
    "comfy_api/latest/_io.py": """
class Input:
    def __init__(self, id, tooltip=None, **more): ...
class Output(Input):
    def __init__(self, tooltip=None): ...
class ComfyTypeIO:
    class Input(Input): ...
    class Output(Output): ...
class Vae(ComfyTypeIO): ...
class Model(ComfyTypeIO):
    class Input(Input):
        def __init__(self, id, {tooltip}=None): ...
@dataclass
class Schema:
    node_id: str
    display_name: str = ""
""",
}


def test_names_are_followed_through_imports_and_base_classes(tmp_path: Path):
    for tooltip, fits in (("tooltip", True), ("hint", False)):
        for name, text in TREE.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.replace("{tooltip}", tooltip))
        found = contract.differences(Sources(tmp_path))
        assert "comfy_api.latest.io.Vae.Input is missing" not in found
        assert not [what for what in found if what.startswith("comfy_api.latest.io.Vae.")]
        assert ("comfy_api.latest.io.Model.Input: got an unexpected keyword argument 'tooltip'" in found) is not fits
        assert "comfy_api.latest.io.Schema: got an unexpected keyword argument 'category'" in found
        assert found["comfy.sd is missing"] == ["model", "refusals", "vae"]


def test_the_command_reads_single_files_and_runs_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "comfy").mkdir()
    file = tmp_path / "comfy" / "utils.py"
    file.write_text("raise SystemExit('this ran')\ndef set_progress_bar_global_hook(): ...\n")
    assert main(["contract", str(file)]) == 1
    told = capsys.readouterr().out
    assert "set_progress_bar_global_hook: too many positional arguments (affects VAE (Parallel)" in told
    assert "comfy.utils.ProgressBar is missing (affects Load Diffusion Model (SP)" in told
    assert told.count("ProgressBar") == 1, "of what is missing, its members need no lines of their own"
    assert main(["contract", str(tmp_path / "utils.py")]) == 1 and "does not exist" in capsys.readouterr().err
    other = tmp_path / "other.py"
    other.touch()
    assert main(["contract", str(other)]) == 1 and "none of those that the pack relies on" in capsys.readouterr().err


def test_only_what_a_difference_affects_is_refused(monkeypatch: pytest.MonkeyPatch):
    found = {"comfy.samplers.KSampler is missing": ["sampler"], "server.PromptServer.routes is missing": ["panel"]}
    monkeypatch.setattr(contract, "changed", lambda: found)
    contract.require("model", "vae")
    with pytest.raises(UnsupportedError, match=r"(?s)Known to work are 0\.21\.0 to .*KSampler is missing .*Sampler"):
        contract.require("sampler")
    assert contract.fits("texts") and not contract.fits("panel")
