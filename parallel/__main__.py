"""Front door of the engine: `python -m parallel demo|doctor`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import Any

from .errors import EngineError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m parallel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    common.add_argument("--devices", default="auto", help="as in SP Config, e.g. cuda:0,cuda:1 or cpu,cpu")
    common.add_argument("--verbose", action="store_true", help="show what the workers print")

    demo = commands.add_parser("demo", parents=[common], help="sample a tiny random HunyuanVideo, split and alone")
    demo.add_argument("--steps", type=int, default=6, help="denoising steps (default 6)")
    demo.add_argument("--output", default="output/demo.webp", help="animated file to write")
    commands.add_parser("doctor", parents=[common], help="check this machine and start the workers once")

    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        result, text, status = _run(options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    print(text)
    if options.json:
        print(json.dumps(result))
    return status


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    if options.command == "demo":
        from .demo.run import run_demo

        return (*run_demo(devices=options.devices, steps=options.steps, output=options.output), 0)
    from .doctor import examine

    result, text = examine(options.devices)
    return result, text, 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
