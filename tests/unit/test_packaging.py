"""The files that ComfyUI, its Manager and the registry read agree with each other."""

from __future__ import annotations

import ast
import fnmatch
import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRA: list[str] = PYPROJECT["project"]["optional-dependencies"]["scripts"]
"""For scripts, the demo and the benchmarks."""


def requirements() -> list[str]:
    lines = (line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_both_requirement_lists_are_equal():
    assert PYPROJECT["project"]["dependencies"] == requirements()


def test_no_requirement_replaces_torch_or_caps_a_shared_package():
    for requirement in [*requirements(), *EXTRA]:
        assert not re.match(r"(torch|torchvision|torchaudio|triton|nvidia.*)\b", requirement, re.IGNORECASE)
        assert not re.search(r"==|~=|<", requirement)


def named(requirement: str) -> str:
    """The module of a requirement."""
    name = re.split(r"[<>=~!\[ ]", requirement)[0]
    return {"Pillow": "PIL"}.get(name, name)


def test_nodes_and_workers_import_what_is_required_or_comfyuis_own():
    """And the rest only what the extra `scripts` brings; tqdm comes with diffusers, as with ComfyUI."""
    required = {"torch", *map(named, requirements())}
    comfyuis = {"aiohttp", "comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "server", "tqdm"}
    scripts = {"tqdm", *map(named, EXTRA)}
    optional = {"sageattention"}  # the user chooses it, and is told where it is missing
    for path in python_files():
        place = path.relative_to(ROOT).as_posix()
        outside = {name for name in imported(path) if name not in sys.stdlib_module_names}
        allowed = required | optional
        if place.startswith(("parallel/diffusers/", "parallel/demo/", "parallel/bench/")):
            allowed = allowed | scripts
        if place == "__init__.py" or place.startswith(("nodes/", "parallel/comfyui/")):
            allowed = allowed | comfyuis
        assert outside <= allowed, f"{place} imports {sorted(outside - allowed)}"


def imported(path: Path) -> set[str]:
    """Packages that a file imports from outside, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_development_has_what_scripts_need():
    """It installs no package of this repository's: .ci/make-venv reads lists."""
    lines = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert set(EXTRA) <= set(lines)


def test_changelog_knows_this_version():
    assert f"## [{PYPROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pytest_stays_out_of_the_root_package():
    """With either of these files it would import the root, which needs ComfyUI."""
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


# --- what the registry reads and looks for ----------------------------------------------------------------------------


def shipped() -> list[Path]:
    """What an archive for the registry holds: the files in git, without those of .comfyignore."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ignored = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    assert all(pattern.startswith("/") for pattern in ignored), "shipped() knows patterns from the root only"
    patterns = [pattern[1:] + "*" if pattern.endswith("/") else pattern[1:] for pattern in ignored]
    return [ROOT / name for name in listed if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def test_the_archive_holds_what_comfyui_needs_and_no_tests():
    names = {path.relative_to(ROOT).as_posix() for path in shipped()}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= names
    assert {"parallel/worker/boot.py", "nodes/sp_config.py", "js/docs/SPConfig.md"} <= names
    folders = {"js", "locales", "nodes", "parallel", "workflows"}
    assert {name.partition("/")[0] for name in names if "/" in name} == folders


def python_files() -> list[Path]:
    return [path for path in shipped() if path.suffix == ".py"]


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execve", "torch.hub.load",
    "pip.main", "urllib.request.urlopen", "requests.get", "requests.post", "marshal.loads", "base64.b64decode",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "pip", "requests", "urllib3"}


def complaints(tree: ast.AST) -> Iterator[str]:
    """What a reviewer of the registry would refuse: https://docs.comfy.org/registry/standards."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS)
        if isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"calls {called}"
            if any(keyword.arg == "shell" for keyword in node.keywords):
                yield "gives a command to a shell"
            if called == "torch.load":
                yield "reads a pickle"
            if called.startswith("subprocess.") and re.search(r"\bpip\b|\buv\b", ast.unparse(node)):
                yield "installs packages"


@pytest.mark.parametrize(
    "code", ["eval(x)", "import pickle", "subprocess.run(x, shell=True)", "subprocess.run([python, '-m', 'pip'])"]
)
def test_the_scan_finds_what_it_looks_for(code: str):
    assert list(complaints(ast.parse(code)))


def test_python_code_runs_and_installs_nothing_from_outside():
    found = {
        path.relative_to(ROOT).as_posix(): list(complaints(ast.parse(path.read_text()))) for path in python_files()
    }
    assert {path: complaint for path, complaint in found.items() if complaint} == {}


def test_workers_and_nvidia_smi_are_the_only_processes_that_are_started():
    starting = [path for path in python_files() if re.search(r"subprocess\.(Popen|run|call|check_)", path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in starting] == [
        "parallel/host/process.py",
        "parallel/report.py",
    ]


def test_scripts_in_the_browser_run_and_fetch_nothing_from_outside():
    for path in shipped():
        if path.suffix in (".js", ".mjs", ".css", ".html"):
            text = path.read_text()
            found = re.findall(
                r"\beval\(|new Function|innerHTML|outerHTML|document\.write|https?://|@import|src=", text
            )
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def metadata_script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("registry_metadata", str(ROOT / ".ci" / "registry-metadata"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_publishing_adds_the_addresses_of_the_repository():
    completed = metadata_script().completed
    text, commit = (ROOT / "pyproject.toml").read_text(), "0" * 40
    published = tomllib.loads(completed(text, "https://github.com/someone/a-fork", commit))
    comfy = published["tool"]["comfy"]
    assert published["project"] == PYPROJECT["project"] | {"urls": published["project"]["urls"]}
    assert published["project"]["urls"]["Repository"] == "https://github.com/someone/a-fork"
    for key, place in (("Icon", "icon.svg"), ("Banner", "banner.svg")):
        assert comfy.pop(key) == f"https://raw.githubusercontent.com/someone/a-fork/{commit}/.github/assets/{place}"
    assert comfy == PYPROJECT["tool"]["comfy"]
    for repository, wrong in (("https://gitlab.com/a/b", commit), ("https://github.com/a/b", "main")):
        with pytest.raises(ValueError, match="allowed"):
            completed(text, repository, wrong)


def test_icon_and_banner_have_the_sizes_that_the_registry_asks_for():
    """https://docs.comfy.org/registry/specifications: at most 800 by 400; 21 to 9."""
    icon, banner = (ElementTree.parse(ROOT / ".github/assets" / name).getroot() for name in ("icon.svg", "banner.svg"))
    assert int(icon.get("width", 0)) <= 800 and int(icon.get("height", 0)) <= 400
    assert int(banner.get("width", 0)) * 9 == int(banner.get("height", 0)) * 21


def test_the_metadata_is_complete():
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,99}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["requires-python"] and (ROOT / project["license-files"][0]).exists()
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"].startswith(">=")
