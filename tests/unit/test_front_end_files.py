"""What ComfyUI's front end loads: complete translations, settings that both halves know, safe scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "js").rglob("*.js"))
LOCALES = ROOT / "locales"
_STRING = r'"((?:[^"\\]|\\.)*)"'


def read(locale: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / locale / f"{name}.json").read_text(encoding="utf-8"))


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    return [value]


def shown_texts() -> set[str]:
    """The English texts of the scripts: what `t` is called with, and the values of tables that it is called with."""
    found = set()
    for script in SCRIPTS:
        source = script.read_text(encoding="utf-8")
        found |= set(re.findall(rf"\bt\(\s*{_STRING}", source))
        if script.name == "states.js":
            found |= {text for text in re.findall(_STRING, source) if text[0].isupper()}
        if script.name == "trouble.js":
            found |= {match[1] for match in re.findall(r'\["(\w+)", "([^"]+)", \d+\]', source)}
        if script.name == "group.js":
            found |= set(re.findall(rf"rows\.push\(\[\s*{_STRING}", source))
    return found


def test_every_text_of_the_scripts_is_translated():
    texts, translated = shown_texts(), read("zh", "main")["sequenceParallel"]
    assert len(texts) > 40, "the search for texts has gone blind"
    assert texts - set(translated) == set()
    assert set(translated) - texts == set(), "nothing shows these any more"


@pytest.mark.parametrize("locale", ["zh"])
def test_translations_keep_the_placeholders(locale: str):
    for english, text in read(locale, "main")["sequenceParallel"].items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english)), english


@pytest.mark.parametrize("path", sorted(LOCALES.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_translations_have_nothing_that_the_front_end_reads_as_syntax(path: Path):
    """vue-i18n links with @: and chooses plurals by |."""
    for text in strings(json.loads(path.read_text(encoding="utf-8"))):
        assert text
        assert not re.search(r"[@|$]", text), text


def test_settings_are_the_same_everywhere():
    registered = (ROOT / "js" / "settings.js").read_text(encoding="utf-8")
    ids = re.findall(rf"id: {_STRING}", registered)
    names = re.findall(rf"name: {_STRING}", registered)
    server = (ROOT / "nodes" / "settings.py").read_text(encoding="utf-8")
    assert set(ids) == set(re.findall(r'"(SequenceParallel\.[\w.]+)"', server))
    english = read("en", "settings")
    assert [english[setting.replace(".", "_")]["name"] for setting in ids] == names
    assert english.keys() == read("zh", "settings").keys()
    tooltips = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', registered))  # they are put together of several strings
    assert all(entry["tooltip"] in tooltips for entry in english.values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_put_text_in_as_text_only(script: Path):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script.read_text()
    )
    if script.name != "comfy.js":
        assert "scripts/app.js" not in script.read_text(), "ComfyUI's front end is used through comfy.js only"
