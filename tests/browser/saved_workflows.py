"""Writes workflows/*.json as the front end saves them: python -m tests.browser.saved_workflows http://127.0.0.1:8188

With ComfyUI running at that address, and playwright and chromium here.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from tests.browser.frontend import CHROMIUM_FLAGS, FrontEnd, find_chromium
from tests.comfyui.installation import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
LINE = 180


def as_text(value: Any, indent: str = "") -> str:
    """JSON that people can read and diff: what fits in a line of LINE characters stands in one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= LINE or not isinstance(value, dict | list) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        parts = [as_text(part, deeper) for part in value]
        opened, closed = "[]"
    else:
        parts = [f"{json.dumps(name)}: {as_text(part, deeper)}" for name, part in value.items()]
        opened, closed = "{}"
    return f"{opened}\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}{closed}"


def main(url: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=list(CHROMIUM_FLAGS))
        front_end = FrontEnd(browser, SimpleNamespace(url=url))
        for path in WORKFLOWS:
            front_end.load_workflow(json.loads(path.read_text()))
            assert front_end.missing_nodes() == [], path
            path.write_text(as_text(front_end.serialize()) + "\n")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
