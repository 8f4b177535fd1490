"""Drafts plans of tiny classes and prints `{class: draft}`. With ComfyUI's Python: python -m tests.comfyui.drafts"""

from __future__ import annotations

import json

from parallel.drafts import draft
from parallel.errors import ConfigError
from tests.comfyui.drafted import CLASSES


def main() -> None:
    found = {}
    for name, (config, inputs, larger) in CLASSES.items():
        try:
            result, text = draft(name, json.dumps(config), inputs, larger)
            found[name] = {**result, "text": text}
        except ConfigError as error:
            found[name] = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
