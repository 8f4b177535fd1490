"""`python -m parallel contract`: checks source files of a ComfyUI against the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .contract import PARTS, describe, differences, symbols
from .contract_readers import Sources


def hold(paths: Sequence[str]) -> tuple[dict[str, Any], str, int]:
    """Checks ComfyUI trees, and single files of one ComfyUI, for which only the modules that they define are checked.

    Returns:
        {tree, or "files": {difference: parts that it affects}}, text for the user, and 1 if there is a difference.

    Raises:
        ConfigError: a path is no tree or file of ComfyUI's that the pack relies on.
    """
    modules = sorted({symbol.module for part in PARTS.values() for symbol in symbols(part)})
    views: dict[str, Path | dict[str, Path]] = {}
    for path in map(Path, paths):
        if path.is_dir():
            if not (path / "comfy").is_dir():
                raise ConfigError(f"the path is {path}, which has no folder comfy; give ComfyUI's own folder, or files")
            views[str(path)] = path
        else:
            files = views.setdefault("files", {})
            assert isinstance(files, dict)
            files[_module_of(path, modules)] = path
    found = {title: differences(Sources(view)) for title, view in views.items()}
    lines = []
    for title, view in views.items():
        what = title if isinstance(view, Path) else ", ".join(sorted(view))
        lines.append(f"{what}: {len(found[title])} differences" if found[title] else f"{what}: fits")
        lines += [f"- {line}" for line in describe(found[title])]
    return found, "\n".join(lines), int(any(found.values()))


def _module_of(path: Path, modules: Sequence[str]) -> str:
    """Returns the module that a file defines: the one whose whole name the file's path ends with, or whose last part is
    the file's name."""
    if not path.is_file():
        raise ConfigError(f"the path is {path}, which does not exist; give a folder or file of ComfyUI's")
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    whole = [module for module in modules if parts[-len(module.split(".")) :] == tuple(module.split("."))]
    named = [module for module in modules if module.split(".")[-1] == parts[-1]]
    if len(found := whole[-1:] or named) != 1:
        what = f"may be {' or '.join(found)}" if found else "is none of those that the pack relies on"
        raise ConfigError(f"the path is {path}, which {what}; give it with its folder, one of: {', '.join(modules)}")
    return found[0]
