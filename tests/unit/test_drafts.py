"""`python -m parallel plan`: what is refused before ComfyUI is imported. The rest is tested in comfyui/."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which has no folder comfy/ldm; give ComfyUI's own folder"),
        (["--config", "[1]"], "config is '[1]'; give a JSON object, or a file with one"),
        (["--input", "y"], "input is 'y'; give NAME=JSON"),
        (["--larger", "y=x"], "input is 'y=x'; give NAME=JSON"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert main(["plan", "Flux", *arguments]) == 1
    assert complaint in capsys.readouterr().err


def test_without_a_path_comfyui_must_enclose_the_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert main(["plan", "Flux"]) == 1
    assert "no ComfyUI encloses this pack; set COMFYUI_PATH to its folder" in capsys.readouterr().err
